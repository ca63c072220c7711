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
    """
    The toy model in the place of stories15M, in a folder where the user has put it -> the folder, and a function that
    runs prepare_data.py on it with more flags.
    """
    data = tmp_path / "data"
    data.mkdir()
    files = []
    for name, source in (("sft.pt", f"{world}/sft.pt"), ("tokenizer.model", TOKENIZER)):
        shutil.copy(source, data / name)
        files.append(("HF_ENDPOINT", f"there/{name}", None, file_hash(source)))
    defaults = {**spo.MODELS["stories15M"], "max_new_tokens": 100}
    monkeypatch.setitem(prepare_data.PUBLISHED, "stories15M", files)
    monkeypatch.setitem(spo.MODELS, "stories15M", defaults)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")

    def run(*flags):
        prepare_data.main(["stories15M", "--data", str(data), *flags])

    return data, run


class MirrorHandler(http.server.BaseHTTPRequestHandler):
    """Answers with the next of server.replies (the last one again and again): status, body, bytes before a cut."""

    def do_GET(self):
        replies, asked_range = self.server.replies, self.headers.get("Range")
        self.server.asked.append((self.path, asked_range))
        status, body, cut = replies.pop(0) if len(replies) > 1 else replies[0]
        if status == 200 and asked_range:
            body = body[int(asked_range.removeprefix("bytes=").removesuffix("-")):]
            status = 206 if body else 416
        self.send_response(200 if status == "no ranges" else status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:cut])

    def log_message(self, *_):
        pass


@pytest.fixture
def mirror(monkeypatch):
    """A local server with .url, .replies to be set and .asked, (path, Range) of each request."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), MirrorHandler)
    server.asked, server.replies, server.url = [], [], f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(llm_judge, "PAUSE", 0.01)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield server
    server.shutdown()
    server.server_close()
