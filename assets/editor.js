// Edits pictures in a browser with the exported folder that this file lies in:
//
//   import { Editor } from "./editor.js";
//   const editor = await Editor.load();
//   await editor.use({ starry: 0.8 });
//   const edit = await editor.edit(context.getImageData(0, 0, 512, 384));
//   context.putImageData(edit, 0, 0);
//
// Make one call at a time. A call that throws changes nothing; the error's message is a sentence.
// Where a GPU fails later on, as a phone's may when it is put away, the CPU goes on with the work.

const FOLDER = new URL(".", import.meta.url);
const SMALLEST_SIDE = 32; // instance norm needs more than one place in the smallest feature map

// ---- Editor -------------------------------------------------------------------------------------

export class Editor {
  // Loads the base and ONNX Runtime. It runs on a GPU through WebGPU where there is one, else on
  // threads, which need cross-origin isolation, else on one thread.
  // onProgress(file, loaded, total) hears of bytes; total is undefined for a runtime on a CDN.
  static async load(onProgress = () => {}) {
    const response = await fetch(new URL("index.json", FOLDER)).catch(() => null);
    if (!response?.ok) {
      throw Error("There is no index.json in this folder.");
    }
    const editor = new Editor();
    editor.index = await response.json();
    editor.onProgress = onProgress;
    editor.graph = await editor.fetchChecked("base.onnx");
    editor.base = new TensorFile("base.safetensors", await editor.fetchChecked("base.safetensors"));
    editor.adapters = {}; // {file: TensorFile} of those fetched so far

    editor.backends = await possibleBackends(); // those not tried yet
    const [first] = editor.index.concepts;
    editor.strengths = { [first.name]: first.adapter ? editor.index.strength : 1 };
    await editor.startFastest();
    editor.onProgress = () => {}; // adapters are kilobytes
    return editor;
  }

  // Starts the fastest backend that works, of those not tried yet.
  async startFastest() {
    let lastError;
    while (this.backends.length) {
      const [provider, threads] = this.backends.shift();
      try {
        await this.start(provider, threads);
        return;
      } catch (error) {
        console.warn(`${provider}, threads: ${threads}: ${error.message ?? error}`);
        lastError = error;
      }
    }
    throw lastError;
  }

  // Loads ONNX Runtime for this provider and proves it with a small edit.
  async start(provider, threads) {
    this.isProven = false;
    const folder = new URL(this.index.web, FOLDER);
    const build = provider === "webgpu" ? "threaded.asyncify" : "threaded";
    const ort = await import(new URL(`ort.${provider}.min.mjs?${threads}`, folder));
    ort.env.logLevel = "error";
    ort.env.wasm.wasmPaths = folder.href;
    const binary = `ort-wasm-simd-${build}.wasm`;
    const bytes = this.index["web bytes"][binary];
    ort.env.wasm.wasmBinary = await this.download(new URL(binary, folder), bytes);
    ort.env.wasm.numThreads = threads;
    ort.env.wasm.proxy = provider === "wasm"; // in a worker, so that the page stays responsive
    this.ort = ort;
    this.provider = provider;
    this.threads = threads;
    await this.use(this.strengths);
    await this.edit(new ImageData(64, 64));
    this.isProven = true;
  }

  // What an action with ONNX Runtime returns. Where a GPU that has worked fails at it, since its
  // device is lost or its memory is full, the CPU does it, and whatever comes after it.
  async orOnCpu(action) {
    try {
      return await action();
    } catch (error) {
      if (this.provider !== "webgpu" || !this.isProven) {
        throw error;
      }
      console.warn(`webgpu: ${error.message ?? error}`);
      await this.startFastest();
      return await action();
    }
  }

  // What lies at an address, as an ArrayBuffer; onProgress hears how far it is. total: its bytes,
  // of which a server that compresses says nothing.
  async download(address, total) {
    const file = decodeURIComponent(address.pathname.slice(address.pathname.lastIndexOf("/") + 1));
    const response = await fetch(address).catch(() => null);
    if (!response?.ok) {
      throw Error(`${file} cannot be fetched.`);
    }
    const parts = [];
    let loaded = 0;
    const reader = response.body.getReader();
    while (true) {
      const { done, value } = await reader.read();
      if (done) {
        break;
      }
      parts.push(value);
      loaded += value.length;
      this.onProgress(file, loaded, total);
    }
    return await new Blob(parts).arrayBuffer();
  }

  // The bytes of one of the folder's files, if it is the one that index.json describes.
  async fetchChecked(file) {
    const path = file.split("/").map(encodeURIComponent).join("/");
    const { bytes, sha256 } = this.index.files[file];
    const data = await this.download(new URL(path, FOLDER), bytes);
    // Browsers have crypto.subtle over https and on localhost alone; elsewhere the length must do.
    const isSame = data.byteLength === bytes && (!crypto.subtle || (await hexSha256(data)) === sha256);
    if (!isSame) {
      throw Error(`${file} is damaged: it is not the file that index.json describes.`);
    }
    return data;
  }

  // Makes edit() draw in these styles. strengths is {name: strength}, of one style or several, each
  // from 0 to 1.5. A strength scales what an adapter changes in the weights; several changes add
  // up. Prompts are mixed in proportion to the strengths. A style of the base has a prompt alone,
  // so that its strength counts only beside another's.
  async use(strengths) {
    const weights = this.base.data.slice(0); // a copy: what is handed to a worker is gone here
    const prompts = [];
    for (const [name, strength] of Object.entries(strengths)) {
      const concept = this.index.concepts.find((concept) => concept.name === name);
      if (!concept) {
        throw Error(`There is no style ${name}.`);
      }
      if (!(strength >= 0 && strength <= 1.5)) {
        throw Error(`${name}: a strength of ${strength} is not from 0 to 1.5.`);
      }
      const isAlone = Object.keys(strengths).length === 1;
      if (isAlone && strength !== 1 && !concept.adapter) {
        throw Error(`${name} is a style of the base: alone it has no strength but 1.`);
      }
      if (concept.adapter) {
        const adapter = await this.fetchAdapter(concept.adapter);
        this.merge(weights, adapter, strength);
        prompts.push({ strength, rows: this.adapterPrompt(adapter) });
      } else {
        prompts.push({ strength, rows: this.basePrompt(concept.place) });
      }
    }
    if (!prompts.length) {
      throw Error("No style is given.");
    }
    const prompt = this.base.has("tokens") ? mixPrompts(prompts) : null;

    const session = await this.orOnCpu(() => this.createSession(weights));
    const oldSession = this.session;
    this.session = session;
    this.prompt = prompt;
    this.strengths = strengths;
    await oldSession?.release().catch(console.warn); // the new one works all the same
  }

  async createSession(weights) {
    return await this.ort.InferenceSession.create(this.graph.slice(0), {
      executionProviders: [this.provider],
      externalData: [{ path: "base.safetensors", data: new Uint8Array(weights) }],
    });
  }

  async fetchAdapter(file) {
    if (!this.adapters[file]) {
      this.adapters[file] = new TensorFile(file, await this.fetchChecked(file));
    }
    const adapter = this.adapters[file];
    if (adapter.about.base !== this.index.files["base.safetensors"].sha256) {
      throw Error(`${file} belongs to another base.`);
    }
    adapter.checkFloats();
    return adapter;
  }

  // A prompt's text features: an array of rows, one a token. null where the base reads no prompts.
  adapterPrompt(adapter) {
    if (!this.base.has("tokens")) {
      return null;
    }
    const { shape, numbers } = adapter.get("tokens");
    const [count, width] = shape;
    if (width !== this.base.get("tokens").shape[2]) {
      throw Error(`${adapter.file}: its prompt does not fit the base.`);
    }
    return splitRows(numbers, count, width);
  }

  basePrompt(place) {
    if (!this.base.has("tokens")) {
      return null;
    }
    const { shape, numbers } = this.base.get("tokens");
    const [concepts, count, width] = shape;
    const isToken = splitRows(this.base.get("mask").numbers, concepts, count)[place];
    const rows = splitRows(numbers, concepts * count, width).slice(place * count, (place + 1) * count);
    return rows.filter((row, index) => isToken[index]); // the rest is padding
  }

  // Adds strength * alpha / rank * B A to the weights, an ArrayBuffer laid out as base.safetensors.
  merge(weights, adapter, strength) {
    const { alpha, ranks } = adapter.about;
    for (const [layer, rank] of Object.entries(ranks)) {
      const a = adapter.get(`${layer}.lora_A`); // (rank, inputs * kernel)
      const b = adapter.get(`${layer}.lora_B`); // (outputs, rank)
      const { shape, numbers, start } = this.base.get(`${layer}.weight`);
      const isTransposed = this.index.transposed.includes(layer); // then inputs come first
      const outputs = isTransposed ? shape[1] : shape[0];
      const inputs = isTransposed ? shape[0] : shape[1];
      const columns = numbers.length / outputs;
      const kernel = columns / inputs; // places of the kernel
      if (`${a.shape}` !== `${[rank, columns]}` || `${b.shape}` !== `${[outputs, rank]}`) {
        throw Error(`${adapter.file}: ${layer} does not fit the base.`);
      }
      const weight = new Float32Array(weights, start, numbers.length);
      const scale = (strength * alpha) / rank;
      for (let output = 0; output < outputs; output++) {
        for (let column = 0; column < columns; column++) {
          let change = 0;
          for (let r = 0; r < rank; r++) {
            change += b.numbers[output * rank + r] * a.numbers[r * columns + column];
          }
          let index = output * columns + column;
          if (isTransposed) {
            const input = Math.floor(column / kernel);
            index = (input * outputs + output) * kernel + (column % kernel);
          }
          weight[index] += scale * change;
        }
      }
    }
  }

  // ImageData of a bitmap, a video or a canvas, scaled so that its longer side has `size` pixels.
  frame(source, size, isMirrored = false) {
    const sourceWidth = source.videoWidth ?? source.width;
    const sourceHeight = source.videoHeight ?? source.height;
    const scale = size / Math.max(sourceWidth, sourceHeight);
    const width = Math.max(1, Math.round(sourceWidth * scale));
    const height = Math.max(1, Math.round(sourceHeight * scale));
    const canvas = new OffscreenCanvas(width, height);
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.fillStyle = "white"; // under what is transparent
    context.fillRect(0, 0, width, height);
    if (isMirrored) {
      context.translate(width, 0);
      context.scale(-1, 1);
    }
    context.imageSmoothingQuality = "high";
    context.drawImage(source, 0, 0, width, height);
    return context.getImageData(0, 0, width, height);
  }

  // ImageData of any size -> its edit, as large. The network takes sides that are multiples of
  // index.multiple; the picture is mirrored beyond its right and lower edge until they are.
  async edit({ data, width, height }) {
    const paddedWidth = this.paddedSide(width);
    const paddedHeight = this.paddedSide(height);
    const rgb = new Uint8Array(3 * paddedWidth * paddedHeight);
    let to = 0;
    for (let y = 0; y < paddedHeight; y++) {
      const row = mirrored(y, height) * width;
      for (let x = 0; x < paddedWidth; x++) {
        const from = 4 * (row + mirrored(x, width));
        rgb[to] = data[from];
        rgb[to + 1] = data[from + 1];
        rgb[to + 2] = data[from + 2];
        to += 3;
      }
    }

    const edited = await this.orOnCpu(() => this.run(rgb, [1, paddedHeight, paddedWidth, 3]));

    const rgba = new Uint8ClampedArray(4 * width * height);
    to = 0;
    for (let y = 0; y < height; y++) {
      let from = 3 * y * paddedWidth;
      for (let x = 0; x < width; x++) {
        rgba[to] = edited[from];
        rgba[to + 1] = edited[from + 1];
        rgba[to + 2] = edited[from + 2];
        rgba[to + 3] = 255;
        from += 3;
        to += 4;
      }
    }
    return new ImageData(rgba, width, height);
  }

  // The network's edit of a photo, both uint8 of this shape.
  async run(rgb, shape) {
    const { Tensor } = this.ort;
    const inputs = { photo: new Tensor("uint8", rgb, shape) };
    if (this.prompt) {
      const count = this.prompt.length;
      const width = this.prompt[0].length;
      const numbers = new Float32Array(count * width);
      this.prompt.forEach((row, index) => numbers.set(row, index * width));
      inputs.text = new Tensor("float32", numbers, [1, count, width]);
    }
    const outputs = await this.session.run(inputs);
    return outputs.edit.data;
  }

  paddedSide(side) {
    const { multiple } = this.index;
    return multiple * Math.ceil(Math.max(side, SMALLEST_SIDE) / multiple);
  }
}

// ---- Helpers ------------------------------------------------------------------------------------

// [provider, threads] to try, the fastest first.
async function possibleBackends() {
  const backends = [["wasm", 1]];
  if (crossOriginIsolated && navigator.hardwareConcurrency > 1) {
    backends.unshift(["wasm", Math.min(navigator.hardwareConcurrency, 8)]);
  }
  const isSafari = navigator.vendor.startsWith("Apple"); // its WebGPU crashes with this runtime
  const gpu = isSafari ? null : await navigator.gpu?.requestAdapter().catch(() => null);
  const isSoftware = gpu?.info?.isFallbackAdapter ?? gpu?.isFallbackAdapter; // slower than wasm
  if (gpu && !isSoftware) {
    backends.unshift(["webgpu", 1]);
  }
  return backends;
}

async function hexSha256(data) {
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", data));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

// numbers of shape (count, width) as an array of rows
function splitRows(numbers, count, width) {
  return Array.from({ length: count }, (_, row) => numbers.subarray(row * width, (row + 1) * width));
}

// The mean of prompts, {strength, rows}, in proportion to their strengths. Shorter ones are filled
// up with their mean row first, so that their mean, which FiLM reads, stays what it was. editor.py
// does the same.
function mixPrompts(prompts) {
  const weighted = prompts.filter((prompt) => prompt.strength > 0);
  if (weighted.length < 2) {
    return (weighted[0] ?? prompts[0]).rows;
  }
  const sum = weighted.reduce((total, { strength }) => total + strength, 0);
  const length = Math.max(...weighted.map(({ rows }) => rows.length));
  const width = weighted[0].rows[0].length;
  const mixed = Array.from({ length }, () => new Float32Array(width));
  for (const { strength, rows } of weighted) {
    const mean = meanRow(rows);
    mixed.forEach((row, index) => {
      const added = rows[index] ?? mean;
      added.forEach((number, column) => (row[column] += (strength / sum) * number));
    });
  }
  return mixed;
}

function meanRow(rows) {
  return rows[0].map((_, column) => rows.reduce((sum, row) => sum + row[column], 0) / rows.length);
}

// The pixel that place i shows when a line of `side` pixels goes on as its own mirror image.
function mirrored(i, side) {
  const place = i % (2 * side);
  return place < side ? place : 2 * side - 1 - place;
}

// ---- Safetensors --------------------------------------------------------------------------------

// A safetensors file: 8 bytes with the header's length, a JSON header, numbers.
class TensorFile {
  constructor(file, data) {
    this.file = file;
    this.data = data;
    this.start = 8 + Number(new DataView(data).getBigUint64(0, true));
    this.header = JSON.parse(new TextDecoder().decode(new Uint8Array(data, 8, this.start - 8)));
    this.about = JSON.parse(this.header.__metadata__.about);
  }

  has(name) {
    return name in this.header;
  }

  // {shape, numbers, start: the tensor's first byte in the file}
  get(name) {
    if (!this.has(name)) {
      throw Error(`${this.file} lacks the tensor ${name}.`);
    }
    const { dtype, shape, data_offsets: [begin, end] } = this.header[name];
    const start = this.start + begin;
    const bytes = this.data.slice(start, this.start + end);
    if (dtype === "F32") {
      return { shape, start, numbers: new Float32Array(bytes) };
    }
    if (dtype === "F16") {
      return { shape, start, numbers: Float32Array.from(new Uint16Array(bytes), floatOfHalf) };
    }
    if (dtype === "BOOL") {
      return { shape, start, numbers: new Uint8Array(bytes) };
    }
    throw Error(`${this.file}: ${name} is ${dtype}, which this page does not read.`);
  }

  // All of an adapter's tensors are floats that every reader can read.
  checkFloats() {
    const { __metadata__, ...tensors } = this.header;
    for (const [name, { dtype }] of Object.entries(tensors)) {
      if (dtype !== "F16" && dtype !== "F32") {
        throw Error(`${this.file}: ${name} is ${dtype}, not F16 or F32.`);
      }
    }
  }
}

// An fp16 number by its bits. Float16Array would do it, but is newer than many phones.
function floatOfHalf(bits) {
  const sign = bits >> 15 ? -1 : 1;
  const exponent = (bits >> 10) & 31;
  const fraction = (bits & 1023) / 1024;
  if (exponent === 31) {
    return fraction ? NaN : sign * Infinity;
  }
  if (exponent === 0) {
    return sign * fraction * 2 ** -14;
  }
  return sign * (1 + fraction) * 2 ** (exponent - 15);
}
