"""An object store in this process that speaks enough of S3's protocol for pyarrow's client."""

from __future__ import annotations

import contextlib
import hashlib
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

BUCKET = "bucket"


class Store(BaseHTTPRequestHandler):
    """One request; the objects are the server's."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def handle_request(self) -> None:
        """Look at the bucket first: nothing else exists."""
        parts = urlsplit(self.path)
        bucket, _, self.key = unquote(parts.path).lstrip("/").partition("/")
        self.query = {k: v[0] for k, v in parse_qs(parts.query, keep_blank_values=True).items()}
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = b"".join(self.chunks())
        else:
            self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "aws-chunked" in (self.headers.get("Content-Encoding") or ""):
            self.body = unchunked(self.body)
        if bucket != BUCKET:
            self.answer(404, b"<Error><Code>NoSuchBucket</Code></Error>")
            return
        getattr(self, f"on_{self.command.lower()}")()

    def chunks(self) -> Iterator[bytes]:
        """The pieces of a body whose length is not told beforehand."""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        while self.rfile.readline().strip():
            continue

    def on_get(self) -> None:
        if not self.key:
            self.answer(200, self.listing())
            return
        self.on_head()

    def on_head(self) -> None:
        data = self.server.objects.get(self.key)
        if not self.key:
            self.answer(200)
        elif data is None:
            self.answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
        elif asked := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or ""):
            first, last = int(asked[1]), min(int(asked[2]), len(data) - 1)
            span = {"Content-Range": f"bytes {first}-{last}/{len(data)}"}
            self.answer(206, data[first : last + 1], **span)
        else:
            self.answer(200, data)

    def on_put(self) -> None:
        if "partNumber" in self.query:
            part = (self.query["uploadId"], int(self.query["partNumber"]))
            self.server.parts[part] = self.body
        else:
            self.server.objects[self.key] = self.body
        self.answer(200, ETag=f'"{hashlib.md5(self.body).hexdigest()}"')

    def on_post(self) -> None:
        if "delete" in self.query:
            for key in re.findall(r"<Key>(.*?)</Key>", self.body.decode()):
                self.server.objects.pop(key, None)
            self.answer(200, b"<DeleteResult></DeleteResult>")
        elif "uploads" in self.query:
            self.server.num_uploads += 1
            name = f"<UploadId>{self.server.num_uploads}</UploadId>"
            self.answer(200, in_result("InitiateMultipartUpload", name))
        else:
            upload = self.query["uploadId"]
            mine = sorted(part for part in self.server.parts if part[0] == upload)
            self.server.objects[self.key] = b"".join(self.server.parts.pop(p) for p in mine)
            self.answer(200, in_result("CompleteMultipartUpload", "<ETag>whole</ETag>"))

    def on_delete(self) -> None:
        self.server.objects.pop(self.key, None)
        self.answer(204)

    def listing(self) -> bytes:
        """Keys below a prefix; with a delimiter, folders in place of what is in them."""
        prefix, delimiter = self.query.get("prefix", ""), self.query.get("delimiter", "")
        keys, folders = [], set()
        for key in sorted(self.server.objects):
            rest = key.removeprefix(prefix)
            if not key.startswith(prefix):
                continue
            if delimiter and delimiter in rest:
                folders.add(prefix + rest.partition(delimiter)[0] + delimiter)
            else:
                keys.append(key)
        entries = "".join(
            f"<Contents><Key>{escape(key)}</Key><Size>{len(self.server.objects[key])}</Size>"
            "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
            for key in keys[: int(self.query.get("max-keys", 1000))]
        )
        entries += "".join(
            f"<CommonPrefixes><Prefix>{escape(f)}</Prefix></CommonPrefixes>" for f in folders
        )
        count = f"<KeyCount>{len(keys) + len(folders)}</KeyCount>"
        return in_result("ListBucket", f"{count}<IsTruncated>false</IsTruncated>{entries}")

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        """Send a whole answer; HEAD has no body but its length."""
        self.send_response(status)
        headers.setdefault("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


class Server(ThreadingHTTPServer):
    """Holds the objects."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Store)
        self.objects: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.num_uploads = 0

    @property
    def uri(self) -> str:
        """A storage path in the bucket; `{}` stands for the folder."""
        host = f"127.0.0.1:{self.server_address[1]}"
        return f"s3://{BUCKET}/{{}}?scheme=http&endpoint_override={host}&region=us-east-1"


def in_result(kind: str, content: str) -> bytes:
    """An answer's XML."""
    return f'<?xml version="1.0"?><{kind}Result>{content}</{kind}Result>'.encode()


def unchunked(body: bytes) -> bytes:
    """The content of a body that was sent in chunks with lengths."""
    content, rest = b"", body
    while rest:
        head, _, rest = rest.partition(b"\r\n")
        size = int(head.split(b";")[0], 16)
        if size == 0:
            break
        content, rest = content + rest[:size], rest[size + 2 :]
    return content


for _method in ("GET", "HEAD", "PUT", "POST", "DELETE"):
    setattr(Store, f"do_{_method}", Store.handle_request)


@contextlib.contextmanager
def object_store() -> Iterator[Server]:
    """The store, up as long as the `with` lasts."""
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join(10)
