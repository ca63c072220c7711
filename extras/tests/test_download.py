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
RIGHT, CUT = (200, BODY, None), (200, BODY, 100_000)


@pytest.mark.parametrize("left, replies, ranges", [
    (None, [CUT, RIGHT], [None, "bytes=100000-"]),                         # continues after a cut
    (BODY[:7], [RIGHT], ["bytes=7-"]),                                     # and after a kill
    (BODY, [RIGHT], ["bytes=300000-"]),
    (None, [CUT, ("no ranges", BODY, None)], [None, "bytes=100000-"]),     # starts again where it cannot
    (None, [(429, b"", None), (500, b"", None), RIGHT], [None, None, None]),
])
def test_downloads_get_over_passing_trouble(mirror, tmp_path, left, replies, ranges):
    path = tmp_path / "sft.pt"
    mirror.replies = replies
    if left is not None:
        (tmp_path / "sft.pt.part").write_bytes(left)
    download.download_verified(f"{mirror.url}/sft.pt", len(BODY), DIGEST, str(path))
    assert path.read_bytes() == BODY and os.listdir(tmp_path) == ["sft.pt"]
    assert [asked for _, asked in mirror.asked] == ranges


@pytest.mark.parametrize("left, reply, words, tries", [
    (None, (404, b"", None), "answers 404", 1),
    (None, (403, b"", None), "answers 403", 1),
    (None, (500, b"", None), "answers 500", 5),
    (None, (200, BODY, 7), "cut after 35 of 300000", 5),
    (None, (200, BODY[::-1], None), "gave 300000 bytes with sha256", 1),
    (None, (200, BODY[:-1], None), "gave 299999 bytes with sha256", 1),
    (None, (200, 9 * BODY, None), "bytes with sha256", 1),
    (None, (200, b"<html>log in</html>", None), "gave 19 bytes with sha256", 1),
    (BODY[:9][::-1], RIGHT, "gave 300000 bytes with sha256", 1),
    (9 * BODY, RIGHT, "gave 2700000 bytes with sha256", 1),
])
def test_downloads_never_put_a_wrong_file_in_place(mirror, tmp_path, left, reply, words, tries):
    mirror.replies = [reply]
    if left is not None:
        (tmp_path / "sft.pt.part").write_bytes(left)
    with pytest.raises(UserError, match=words) as error:
        download.download_verified(f"{mirror.url}/sft.pt", len(BODY), DIGEST, f"{tmp_path}/sft.pt")
    assert "\n" not in str(error.value) and len(mirror.asked) == tries
    assert not (tmp_path / "sft.pt").exists()
    if "sha256" in words:
        assert os.listdir(tmp_path) == []


def test_a_published_model_comes_from_its_mirrors(published, mirror, monkeypatch, capsys):
    data, run = published
    bodies = [(data / name).read_bytes() for name in ("sft.pt", "tokenizer.model")]
    mirror.replies = [(200, body, None) for body in bodies]
    monkeypatch.setenv("HF_ENDPOINT", f"{mirror.url}/hf/")
    run()  # what the user has put there is right, and stays
    assert mirror.asked == []
    shutil.rmtree(data)
    run()
    assert [path for path, _ in mirror.asked] == ["/hf/there/sft.pt", "/hf/there/tokenizer.model"]
    assert [(data / name).read_bytes() for name in ("sft.pt", "tokenizer.model")] == bodies
    assert "is ready" in capsys.readouterr().out
    for files in prepare_data.PUBLISHED.values():
        assert all(endpoint in download.ENDPOINTS and len(sha256) == 64 for endpoint, *_, sha256 in files)
    monkeypatch.delenv("HF_ENDPOINT")
    assert download.full_url("HF_ENDPOINT", "a/b") == "https://huggingface.co/a/b"
