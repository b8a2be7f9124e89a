"""Shows the folder that this file lies in to this machine's browsers: python serve.py [PORT]"""

import functools
import gzip
import http.server
import subprocess
import sys
import tarfile
from pathlib import Path

PACKAGE = "onnxruntime-web@1.30.0"
BUILDS = ["ort.wasm.min.mjs", "ort.webgpu.min.mjs"]  # and what they load
for part in ("threaded", "threaded.asyncify"):
    BUILDS += [f"ort-wasm-simd-{part}.mjs", f"ort-wasm-simd-{part}.wasm"]


def fetch_runtime(folder: Path, cdn: bool = False) -> str:
    """Puts onnxruntime-web from npm into folder/ort, unless told to leave it on its CDN, or npm is
    not there. Returns the address, from the folder, at which the page finds it."""
    address = f"https://cdn.jsdelivr.net/npm/{PACKAGE}/dist/"
    if cdn:
        return address
    command = ["npm", "pack", PACKAGE, "--silent", "--prefer-offline", "--fetch-retries=0"]
    command.append("--fetch-timeout=20000")  # ms
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=120)
    except (OSError, subprocess.SubprocessError) as error:
        print(f"npm gives no {PACKAGE} ({error}): the page loads it from {address}")
        return address
    archive = folder / f"{PACKAGE.replace('@', '-')}.tgz"
    ort = folder / "ort"
    ort.mkdir()
    wanted = {f"package/dist/{name}" for name in BUILDS}
    with tarfile.open(archive) as members:
        for member in members:  # in the archive's order: going back would unpack it again
            if member.name in wanted:
                (ort / Path(member.name).name).write_bytes(members.extractfile(member).read())
    archive.unlink()
    return "ort/"


COMPRESSED = (".html", ".js", ".json", ".mjs", ".onnx", ".wasm")  # weights hardly get smaller


@functools.lru_cache
def gzipped(path: Path, version: str) -> bytes:
    """A file's bytes, compressed once for each version of it."""
    return gzip.compress(path.read_bytes(), compresslevel=6)


class Handler(http.server.SimpleHTTPRequestHandler):
    """With the two headers without which browsers give a page no threads, with types that Windows'
    registry has wrong at times, and compressing: the runtime's 14 MB travel as 4."""

    extensions_map = dict.fromkeys((".js", ".mjs"), "text/javascript")
    extensions_map |= {".wasm": "application/wasm", ".json": "application/json"}
    extensions_map[".webmanifest"] = "application/manifest+json"

    def do_GET(self):
        """Sends a file, compressed if that is worth it and the browser takes it."""
        path = Path(self.translate_path(self.path))
        takes_gzip = "gzip" in self.headers.get("Accept-Encoding", "")
        if not takes_gzip or path.suffix not in COMPRESSED or not path.is_file():
            super().do_GET()
            return
        about = path.stat()
        version = f'"{about.st_mtime_ns}-{about.st_size}"'
        if self.headers.get("If-None-Match") == version:  # the browser has it
            self.send_response(http.HTTPStatus.NOT_MODIFIED)
            self.end_headers()
            return
        data = gzipped(path, version)
        self.send_response(http.HTTPStatus.OK)
        self.send_header("Content-Type", self.guess_type(path))
        self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", version)
        self.send_header("Vary", "Accept-Encoding")
        self.end_headers()
        self.wfile.write(data)

    def end_headers(self):
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.send_header("Cache-Control", "no-cache")  # asks whether a file has changed
        super().end_headers()


def serve(folder: Path, port: int) -> None:
    """Until Ctrl-C. port 0 is any free one. OSError if there is no folder or no port."""
    if not (folder / "index.json").is_file():
        raise FileNotFoundError(f"{folder} holds no index.json: 06_export_onnx.py writes one")
    handler = functools.partial(Handler, directory=folder)
    try:
        server = http.server.ThreadingHTTPServer(("localhost", port), handler)
    except OSError as error:
        raise OSError(f"port {port} cannot be used ({error.strerror}): give another") from None
    print(f"{folder}: open http://localhost:{server.server_port}, Ctrl-C stops", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    try:
        serve(Path(__file__).parent, int([*sys.argv, 8000][1]))
    except KeyboardInterrupt:
        print()
    except (OSError, ValueError, OverflowError) as error:
        sys.exit(f"error: {error}")
