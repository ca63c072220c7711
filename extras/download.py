"""Downloads that survive a cut and never leave a wrong file."""
import os
import shutil
import urllib.request

from extras.llm_judge import with_retries
from model import UserError, file_hash

# environment variable -> the address it replaces: the usual variable for mirrors of the first, ours for the others
ENDPOINTS = dict(HF_ENDPOINT="https://huggingface.co", LLAMA2C_ENDPOINT="https://raw.githubusercontent.com",
                 RELEASE_ENDPOINT="https://anonymous.4open.science")
TIMEOUT = 60  # seconds of silence


def full_url(endpoint, path):
    """The url of path at an endpoint, a key of ENDPOINTS."""
    address = (os.environ.get(endpoint) or ENDPOINTS[endpoint]).rstrip("/")
    if not address.startswith(("http://", "https://")):
        raise UserError(f"{endpoint} is {address}: it must begin with http:// or https://.")
    return f"{address}/{path}"


def stream(url, f):
    """
    Writes the body of url to the open file f, after what an earlier attempt left in f if the server can continue.
    Raises OSError where the connection is cut.
    """
    start = max(0, f.seek(0, os.SEEK_END) - 1)  # the last byte is asked for again: there is always one to send
    headers = {"User-Agent": "spo"}
    if start > 0:
        headers["Range"] = f"bytes={start}-"
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT) as response:
        f.seek(start if response.status == 206 else 0)
        f.truncate()
        print(f"{(response.length or 0) >> 20} MiB to download", flush=True)
        shutil.copyfileobj(response, f)
        if response.length:
            raise OSError(f"cut after {f.tell()} bytes, {response.length} missing")


def download_verified(url, size, sha256, path):
    """
    Downloads url to path.part, continuing what an interrupted download left there, and moves it to path when its size
    (None: not known) and sha256 are right; else deletes it and raises UserError.
    """
    part = f"{path}.part"
    by_hand = f"or fetch it by other means to {path.removesuffix('.new')}, where its sha256 is checked"
    with open(part, "ab") as f:
        with_retries(url, lambda: stream(url, f),
                     {None: f"try later, name a mirror with {' or '.join(ENDPOINTS)}, {by_hand}"})
    length, digest = os.path.getsize(part), file_hash(part)
    if digest != sha256 or length != (size or length):
        os.remove(part)
        raise UserError(f"{url} gave {length} bytes with sha256 {digest[:8]}.., not {size or length} with "
                        f"{sha256[:8]}..: nothing was kept; try again, name a mirror, {by_hand}.")
    os.replace(part, path)
