// Keeps what the page has fetched, so that it works offline after the first visit. The network
// comes first: a folder that was exported anew is shown anew.

const CACHE = "image-edits";

self.addEventListener("install", (event) => {
  self.skipWaiting();
  event.waitUntil(keepSmallFiles());
});

self.addEventListener("activate", (event) => {
  event.waitUntil(self.clients.claim()); // the first visit's page too
});

self.addEventListener("fetch", (event) => {
  if (event.request.method === "GET") {
    event.respondWith(answer(event));
  }
});

// The page itself, which was fetched before this worker ran, and every style's few kilobytes. The
// base and the runtime are kept as they pass.
async function keepSmallFiles() {
  const response = await fetch("index.json");
  const index = await response.json();
  const thumbnails = index.concepts.map(({ name }) => `thumbnails/${encodeURIComponent(name)}.jpg`);
  const adapters = Object.keys(index.files).filter((file) => file.startsWith("adapters/"));
  const page = ["./", "index.json", "editor.js", "manifest.webmanifest", "icon.svg", "photo.jpg"];
  const adapterAddresses = adapters.map((file) => file.split("/").map(encodeURIComponent).join("/"));
  const cache = await caches.open(CACHE);
  const keep = async (file) => {
    try {
      await cache.add(file);
    } catch (error) {
      console.warn(`${file} will be missing offline: ${error.message}`);
    }
  };
  await Promise.all([...page, ...thumbnails, ...adapterAddresses].map(keep));
}

async function answer(event) {
  const cache = await caches.open(CACHE);
  try {
    const response = await fetch(event.request);
    if (response.ok) {
      event.waitUntil(cache.put(event.request, response.clone()));
    }
    return response;
  } catch (error) {
    const kept = await cache.match(event.request);
    if (kept) {
      return kept;
    }
    throw error;
  }
}
