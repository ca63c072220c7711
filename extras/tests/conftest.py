"""Fixtures that the tests of extras/ share."""
import http.server
import os
import shutil
import threading

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks: the tests run on the CPU
import pytest
import torch

import prepare_data
import spo
from extras import llm_judge
from model import file_hash

torch.set_num_threads(1)
ROOT = os.path.dirname(os.path.abspath(spo.__file__))
TOKENIZER = f"{ROOT}/tokenizer.model"
TINY = ["--num_stories", "200", "--sft_steps", "20", "--num_pairs", "48", "--num_ref", "64"]


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A data folder as `prepare_data.py toy` creates it, of a model that has hardly learned. Copy it to change it."""
    data = str(tmp_path_factory.mktemp("world"))
    prepare_data.main(["toy", "--data", data, "--tokenizer", TOKENIZER, *TINY])
    return data


@pytest.fixture
def published(world, tmp_path, monkeypatch):
    """The toy model in place of stories15M, put there by the user -> the folder, and a function that prepares it."""
    data = tmp_path / "data"
    data.mkdir()
    files = [shutil.copy(f"{world}/sft.pt", data), shutil.copy(TOKENIZER, data)]
    downloads = [("HF_ENDPOINT", f"there/{os.path.basename(path)}", None, file_hash(path)) for path in files]
    monkeypatch.setitem(prepare_data.PUBLISHED, "stories15M", downloads)
    monkeypatch.setitem(spo.MODELS["stories15M"], "max_new_tokens", 100)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    return data, lambda *flags: prepare_data.main(["stories15M", "--data", str(data), *flags])


class MirrorHandler(http.server.BaseHTTPRequestHandler):
    """Answers with the next of server.replies (the last one again and again): status, body, bytes before a cut."""

    def do_GET(self):
        replies, start = self.server.replies, int(self.headers.get("Range", "bytes=0-")[6:-1])
        self.server.asked.append((self.path, start))
        status, body, cut = replies.pop(0) if len(replies) > 1 else replies[0]
        if status == 206:
            body = body[start:]
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:cut])

    def log_message(self, *_):
        pass


@pytest.fixture
def mirror(monkeypatch):
    """A local server with .url, .replies to be set and .asked, (path, first byte) of each request."""
    monkeypatch.setattr(llm_judge, "PAUSE", 0.01)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), MirrorHandler) as server:
        server.asked, server.replies, server.url = [], [], f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()
