// Edits pictures with the folder that this file lies in. In a page:
//
//   import { Editor } from "./editor.js";
//   const editor = await Editor.load();
//   await editor.use("starry", 0.8); // fetches an adapter once
//   context.putImageData(await editor.edit(context.getImageData(0, 0, 512, 384)), 0, 0);
//
// One call at a time. A call that throws (an Error whose message is a sentence) changes nothing.

const HERE = new URL(".", import.meta.url);

export class Editor {
  // On a GPU through WebGPU if that is there and works, else on threads (which need cross-origin
  // isolation), else on one.
  static async load() {
    const response = await fetch(new URL("index.json", HERE));
    if (!response.ok) throw Error("There is no index.json in this folder.");
    const editor = new Editor(), index = (editor.index = await response.json());
    editor.graph = await editor.fetch("base.onnx");
    editor.base = new Tensors(await editor.fetch("base.safetensors"));
    editor.adapters = {}; // those fetched, by file
    const side = index.multiple * Math.ceil(64 / index.multiple);
    const crashes = navigator.vendor.startsWith("Apple"); // Safari's WebGPU, with this runtime
    const gpu = crashes ? null : await navigator.gpu?.requestAdapter().catch(() => null);
    const isSoftware = gpu?.info?.isFallbackAdapter ?? gpu?.isFallbackAdapter; // slower than the CPU
    const threads = crossOriginIsolated ? Math.min(navigator.hardwareConcurrency, 8) : 1;
    const ways = threads > 1 ? [["wasm", threads], ["wasm", 1]] : [["wasm", 1]];
    if (gpu && !isSoftware) ways.unshift(["webgpu", 1]);
    for (const [provider, count] of ways) {
      try {
        const web = new URL(index.web, HERE);
        const ort = await import(new URL(`ort.${provider}.min.mjs?${count}`, web));
        ort.env.logLevel = "error";
        const proxy = provider === "wasm"; // in a worker: the page stays responsive
        Object.assign(ort.env.wasm, { wasmPaths: web.href, numThreads: count, proxy });
        Object.assign(editor, { ort, provider, threads: count });
        await editor.use(index.concepts[0].name, index.strength);
        await editor.edit(new ImageData(side, side));
        return editor;
      } catch (error) {
        console.warn(`${provider}, ${count} threads: ${error.message}`);
        editor.failed = error;
      }
    }
    throw editor.failed;
  }

  // The bytes of a file, if it is the one that index.json describes.
  async fetch(file) {
    const address = new URL(file.split("/").map(encodeURIComponent).join("/"), HERE);
    const response = await fetch(address).catch(() => ({ ok: false }));
    if (!response.ok) throw Error(`${file} cannot be fetched.`);
    const data = await response.arrayBuffer(), { bytes, sha256 } = this.index.files[file];
    let same = data.byteLength === bytes;
    if (same && crypto.subtle) { // which browsers have over https and on localhost
      const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", data));
      same = sha256 === Array.from(digest, (x) => x.toString(16).padStart(2, "0")).join("");
    }
    if (!same) throw Error(`${file} is damaged: it is not the file that index.json describes.`);
    return data;
  }

  // Makes edit() this concept's. strength (0 to 1.5) scales an adapter's change of the weights.
  async use(name, strength = 1) {
    const concept = this.index.concepts.find((concept) => concept.name === name);
    if (!concept) throw Error(`There is no concept ${name}.`);
    if (!(strength >= 0 && strength <= 1.5)) throw Error(`${strength} is no strength from 0 to 1.5.`);
    const data = this.base.data.slice(0); // whatever is passed to a worker is gone
    let text = this.base.header.tokens && this.base.get("tokens");
    if (concept.adapter) {
      const file = concept.adapter;
      const adapter = (this.adapters[file] ??= new Tensors(await this.fetch(file)));
      const ours = this.index.files["base.safetensors"].sha256;
      if (adapter.about.base !== ours) throw Error(`${file} belongs to another base.`);
      this.merge(data, adapter, strength);
      text &&= adapter.get("tokens"); // (T, D)
      if (text && text.shape[1] !== this.base.header.tokens.shape[2]) throw Error(`${file}: its prompt does not fit the base.`);
    } else if (text) {
      const [, tokens, width] = text.shape, start = concept.place * tokens;
      const mask = this.base.get("mask").data.subarray(start, start + tokens);
      const count = mask.reduce((sum, counts) => sum + counts); // of its tokens, padding left out
      const numbers = text.data.subarray(start * width, (start + count) * width);
      text = { shape: [count, width], data: numbers };
    }
    const externalData = [{ path: "base.safetensors", data: new Uint8Array(data) }];
    const options = { executionProviders: [this.provider], externalData };
    const session = await this.ort.InferenceSession.create(this.graph.slice(0), options);
    const old = this.session;
    Object.assign(this, { name, strength, session, text });
    await old?.release().catch((error) => console.warn(error)); // the new one works all the same
  }

  // Adds strength * alpha / rank * B A to the weights in data, laid out as base.safetensors.
  merge(data, adapter, strength) {
    for (const [layer, rank] of Object.entries(adapter.about.ranks)) {
      const [a, b] = ["A", "B"].map((letter) => adapter.get(`${layer}.lora_${letter}`));
      const weight = this.base.get(`${layer}.weight`), transposed = this.index.transposed.includes(layer);
      const [out, into] = transposed ? [weight.shape[1], weight.shape[0]] : weight.shape;
      const columns = weight.data.length / out, k = columns / into; // k: the kernel's places
      const fits = `${[a.shape, b.shape]}` === `${[rank, columns, out, rank]}`;
      if (!fits) throw Error(`The adapter's ${layer} does not fit the base.`);
      const sums = new Float32Array(data, weight.at, out * columns);
      const scale = (strength * adapter.about.alpha) / rank;
      for (let o = 0; o < out; o++) {
        for (let c = 0; c < columns; c++) {
          let change = 0;
          for (let r = 0; r < rank; r++) change += b.data[o * rank + r] * a.data[r * columns + c];
          const at = transposed ? (Math.floor(c / k) * out + o) * k + (c % k) : o * columns + c;
          sums[at] += scale * change;
        }
      }
    }
  }

  // ImageData of a bitmap, a video or a canvas, scaled so that its longer side is about this long.
  frame(source, size) {
    const sides = [source.videoWidth ?? source.width, source.videoHeight ?? source.height];
    const { multiple } = this.index, scale = size / Math.max(...sides) / multiple;
    const least = Math.ceil(32 / multiple); // a norm needs more than one place
    const [width, height] = sides.map((x) => multiple * Math.max(least, Math.round(x * scale)));
    const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
    context.fillStyle = "white"; // below what is transparent
    context.fillRect(0, 0, width, height);
    context.imageSmoothingQuality = "high";
    context.drawImage(source, 0, 0, width, height);
    return context.getImageData(0, 0, width, height);
  }

  // ImageData, its sides multiples of index.multiple -> its edit, as large.
  async edit({ data, width, height }) {
    const { Tensor } = this.ort, places = width * height, rgb = new Uint8Array(3 * places);
    for (let p = 0; p < places; p++) // a subarray for each place takes ten times as long
      for (let c = 0; c < 3; c++) rgb[3 * p + c] = data[4 * p + c];
    const feeds = { photo: new Tensor("uint8", rgb, [1, height, width, 3]) };
    if (this.text) feeds.text = new Tensor("float32", this.text.data.slice(), [1, ...this.text.shape]);
    const edit = (await this.session.run(feeds)).edit.data;
    const rgba = new Uint8ClampedArray(4 * places).fill(255);
    for (let p = 0; p < places; p++)
      for (let c = 0; c < 3; c++) rgba[4 * p + c] = edit[3 * p + c];
    return new ImageData(rgba, width, height);
  }
}

// A safetensors file: 8 bytes of length, a JSON header, numbers.
class Tensors {
  constructor(data) {
    this.data = data;
    this.start = 8 + Number(new DataView(data).getBigUint64(0, true));
    this.header = JSON.parse(new TextDecoder().decode(new Uint8Array(data, 8, this.start - 8)));
    this.about = JSON.parse(this.header.__metadata__.about);
  }

  // {shape, data, at: where in the file}
  get(name) {
    if (!this.header[name]) throw Error(`A file lacks its tensor ${name}.`);
    const { dtype, shape, data_offsets: [begin, end] } = this.header[name];
    const bytes = this.data.slice(this.start + begin, this.start + end);
    const kind = { F32: Float32Array, F16: Uint16Array, BOOL: Uint8Array }[dtype];
    const numbers = new kind(bytes), data = dtype === "F16" ? Float32Array.from(numbers, widen) : numbers;
    return { shape, data, at: this.start + begin };
  }
}

// An fp16 number by its bits: Float16Array is newer than many phones.
function widen(bits) {
  const sign = bits >> 15 ? -1 : 1, exponent = (bits >> 10) & 31, fraction = (bits & 1023) / 1024;
  return sign * (exponent ? (1 + fraction) * 2 ** (exponent - 15) : fraction * 2 ** -14);
}
