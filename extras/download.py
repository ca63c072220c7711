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

TINYLLAMAS = "karpathy/tinyllamas/resolve"
LLAMA2_TOKENIZER = ("LLAMA2C_ENDPOINT", "karpathy/llama2.c/350e04fe35433e6d2941dce5a1f53308f87058eb/tokenizer.model",
                    499_723, "9e556afd44213b6bd1be2b850ebbbd98f5481437a8021afaf58ee7fb1818d347")
# Checkpoint, then its tokenizer: endpoint, path, bytes (None: not known), sha256. The paper's revision has no .pt.
PUBLISHED = {
    "stories260K": (("HF_ENDPOINT", f"{TINYLLAMAS}/cbffbc90324256436c13dc6b4592c82c1e716354/stories260K/stories260K.pt",
                     None, "eec953f9d0f139e894ef8996302680e64b24813c7a98425424f5c85f7cf4abb1"),
                    ("HF_ENDPOINT", f"{TINYLLAMAS}/cbffbc90324256436c13dc6b4592c82c1e716354/stories260K/tok512.model",
                     None, "dfff07d929db979913f166ec94a6f5ecad4c70cfed8eb5c9cbe7e464455e46f5")),
    "stories15M": (("HF_ENDPOINT", f"{TINYLLAMAS}/32cc2486abd3c2100a6fcf0ef68a7ee3842407b7/stories15M.pt",
                    60_789_090, "3da00c0fef684f3f83b457736837c46ab55e92a26662b61d6104de2d271c708d"), LLAMA2_TOKENIZER),
    "stories42M": (("HF_ENDPOINT", f"{TINYLLAMAS}/58e1696980dcbdf80b2dfe876819104a174f5e78/stories42M.pt",
                    166_787_298, "fbe124df8794c2e033432c22b59cff64485455b4644046c52a456d0bbd8859fe"), LLAMA2_TOKENIZER),
    "stories110M": (("HF_ENDPOINT", f"{TINYLLAMAS}/302d182797471b93cb4d6af3608e501efeeda0c2/stories110M.pt",
                     438_163_693, "cdef30b5108d1b5d1c232fcf7e2ea433cc6cdc473aa876af9d8d6ce83bf4b5e0"),
                    LLAMA2_TOKENIZER),
}


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
