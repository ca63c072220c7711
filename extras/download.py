"""
Downloads that survive a cut and never leave a wrong file.
"""
import os
import time
import urllib.error
import urllib.request

from extras.llm_judge import with_retries
from model import UserError, file_hash

# environment variable -> the address it replaces: the usual variable for mirrors of the first, ours for the others
ENDPOINTS = dict(HF_ENDPOINT="https://huggingface.co", LLAMA2C_ENDPOINT="https://raw.githubusercontent.com",
                 RELEASE_ENDPOINT="https://anonymous.4open.science")
TIMEOUT = 60        # seconds of silence
BLOCK = 1 << 18     # bytes per read
MAX_UNKNOWN = 1 << 26  # bytes of a file whose size is not known


def full_url(endpoint, path):
    """The url of path at an endpoint, a key of ENDPOINTS."""
    address = (os.environ.get(endpoint) or ENDPOINTS[endpoint]).rstrip("/")
    if not address.startswith(("http://", "https://")):
        raise UserError(f"{endpoint} is {address}: it must begin with http:// or https://.")
    return f"{address}/{path}"


def stream(url, f, limit):
    """
    Writes the body of url to the open file f, after what an earlier attempt left in f if the server can continue. Stops
    after limit bytes. Raises OSError where the connection is cut.
    """
    start = f.seek(0, os.SEEK_END)
    headers = {"User-Agent": "spo"}
    if start > 0:
        headers["Range"] = f"bytes={start}-"
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT) as response:
        if response.status != 206:
            f.seek(0)
            f.truncate()
        total, shown = f.tell() + (response.length or 0), time.monotonic()
        block = response.read(BLOCK)
        while block and f.tell() <= limit:
            f.write(block)
            if time.monotonic() > shown + 10:
                shown = time.monotonic()
                print(f"{f.tell() >> 20} of {total >> 20} MiB", flush=True)
            block = response.read(BLOCK)
        if not block and response.length:
            raise OSError(f"cut after {f.tell()} of {total} bytes")


def download_verified(url, size, sha256, path):
    """
    Downloads url to path.part, continuing what an interrupted download left there, and moves it to path when its size
    (None: not known) and sha256 are right; else deletes it and raises UserError.
    """
    part = f"{path}.part"

    def attempt():
        with open(part, "ab") as f:
            try:
                stream(url, f, size or MAX_UNKNOWN)
            except urllib.error.HTTPError as error:
                if error.code != 416:  # 416: the server has no more than is here, which is right or wrong
                    raise

    with_retries(url, attempt, {None: "try later, or name a mirror with " + " or ".join(ENDPOINTS)})
    length, digest = os.path.getsize(part), file_hash(part)
    if digest != sha256 or length != (size or length):
        os.remove(part)
        raise UserError(f"{url} gave {length} bytes with sha256 {digest[:8]}.., not {size or length} with "
                        f"{sha256[:8]}..: nothing was kept; try again, or name a mirror.")
    os.replace(part, path)
