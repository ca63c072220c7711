"""Downloads from a server that can be told to misbehave: the right file at last, or none."""
import hashlib
import os
import random
import shutil

import pytest

import prepare_data
from extras import download
from model import UserError

BODY = random.Random(0).randbytes(300_000)
DIGEST = hashlib.sha256(BODY).hexdigest()
RIGHT, CUT = (206, BODY, None), (206, BODY, 100_000)


@pytest.mark.parametrize("left, replies, starts", [
    (b"", [CUT, RIGHT], [0, 99999]),                     # continues after a cut
    (BODY[:7], [RIGHT], [6]),                               # and after a kill
    (BODY, [RIGHT], [299999]),
    (b"", [CUT, (200, BODY, None)], [0, 99999]),         # starts again where it cannot
    (b"", [(429, b"", None), (500, b"", None), RIGHT], [0, 0, 0]),
])
def test_downloads_get_over_passing_trouble(mirror, tmp_path, left, replies, starts):
    mirror.replies = replies
    (tmp_path / "sft.pt.part").write_bytes(left)
    download.download_verified(f"{mirror.url}/sft.pt", len(BODY), DIGEST, f"{tmp_path}/sft.pt")
    assert (tmp_path / "sft.pt").read_bytes() == BODY and os.listdir(tmp_path) == ["sft.pt"]
    assert [start for _, start in mirror.asked] == starts


@pytest.mark.parametrize("left, reply, size, words, tries", [
    (b"", (404, b"", None), len(BODY), "answers 404.* by other means to .*/sft.pt, where", 1),
    (b"", (206, BODY, 7), len(BODY), "cut after 31 bytes, 299969 missing", 5),
    (b"", (200, BODY[::-1], None), len(BODY), "gave 300000 bytes with sha256", 1),
    (b"", RIGHT, 7, "gave 300000 bytes with sha256 .* not 7 with", 1),
    (BODY[:9][::-1], RIGHT, len(BODY), "gave 300000 bytes with sha256", 1),
])
def test_downloads_never_put_a_wrong_file_in_place(mirror, tmp_path, left, reply, size, words, tries):
    mirror.replies = [reply]
    (tmp_path / "sft.pt.part").write_bytes(left)
    with pytest.raises(UserError, match=words):
        download.download_verified(f"{mirror.url}/sft.pt", size, DIGEST, f"{tmp_path}/sft.pt")
    assert len(mirror.asked) == tries and not (tmp_path / "sft.pt").exists()
    assert (tmp_path / "sft.pt.part").exists() == ("sha256" not in words)


def test_a_published_model_comes_from_its_mirrors(published, mirror, monkeypatch):
    data, run = published
    bodies = [(data / name).read_bytes() for name in prepare_data.CHECKPOINT_FILES]
    mirror.replies = [(200, body, None) for body in bodies]
    monkeypatch.setenv("HF_ENDPOINT", f"{mirror.url}/hf/")
    run()  # what the user has put there is right, and stays
    assert mirror.asked == []
    shutil.rmtree(data)
    run()
    assert [path for path, _ in mirror.asked] == ["/hf/there/sft.pt", "/hf/there/tokenizer.model"]
    assert [(data / name).read_bytes() for name in prepare_data.CHECKPOINT_FILES] == bodies
