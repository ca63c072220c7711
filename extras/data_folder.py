"""Data folders, data/<model>: what they were made with, and which of their files are ours."""
import contextlib
import fcntl
import json
import os

import numpy as np

from model import UserError, atomic_write, file_hash, load_checkpoint


@contextlib.contextmanager
def open_folder(path):
    """The DataFolder at path, for one process at a time. Removes the folder again where it is empty."""
    os.makedirs(path, exist_ok=True)
    with open(f"{path}/.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another prepare_data.py is writing to {path}: wait for it.") from None
        try:
            yield DataFolder(path)
        finally:
            os.remove(lock.name)
            if not os.listdir(path):
                os.rmdir(path)


class DataFolder:
    """
    The data folder at path. Its settings.json holds settings; inputs, name -> sha256 of what it was made from; files,
    name -> sha256 of each file of ours. A file is listed there before it is moved into place: so an interrupted run
    continues where it was, and a file that is not listed is the user's.
    """

    def __init__(self, path):
        self.path, self.settings, self.inputs, self.files = path, {}, {}, {}
        if self.has("settings.json"):
            try:
                with open(f"{path}/settings.json") as f:
                    content = json.load(f)
                self.settings, self.inputs, self.files = (dict(content[x]) for x in ("settings", "inputs", "files"))
            except (ValueError, LookupError, TypeError):
                self.refuse("has a settings.json that is damaged, or of another program or version")

    def refuse(self, trouble):
        raise UserError(f"{self.path} {trouble}: name another --data, or delete {self.path}.")

    def save(self):
        content = dict(settings=self.settings, inputs=self.inputs, files=self.files)
        with atomic_write(f"{self.path}/settings.json") as f:
            f.write(json.dumps(content, indent=1).encode())

    def has(self, *names):
        return all(os.path.exists(f"{self.path}/{name}") for name in names)

    def merge_settings(self, given, defaults):
        """What is not given stays as it was recorded, or gets its default. Refuses to change what was recorded."""
        recorded = {name: value for name, value in self.settings.items() if value is not None}
        for name, value in given.items():
            if recorded.get(name, value) != value:
                self.refuse(f"was made with {name} {recorded[name]}, not {value}")
        self.settings = {**defaults, **recorded, **given}

    def check_input(self, name, digest):
        """Records the sha256 of what the folder is made from. Refuses another one than was recorded."""
        if self.inputs.setdefault(name, digest) != digest:
            self.refuse(f"was made from another {name} (its sha256 differs)")

    def check_files(self, names, published):
        """
        Refuses files that are not ours or were changed. published: name -> sha256 of what the user may download. A file
        that was ours and is damaged is moved aside, to be made again.
        """
        for name in filter(self.has, {*names, *self.files}):
            digest = file_hash(f"{self.path}/{name}")
            if digest == published.get(name):
                self.files[name] = digest
            aside = f"{self.path}/{name}.damaged"
            if digest == self.files.get(name):
                continue
            if name in self.files and self.is_damaged(name) and not os.path.exists(aside):
                print(f"{self.path}/{name} is damaged: moved to {aside}, and made again")
                os.rename(f"{self.path}/{name}", aside)
            else:
                raise UserError(f"{self.path}/{name} was not written by prepare_data.py, or was changed since: "
                                "move or delete it, or name another --data.")

    def is_damaged(self, name):
        """Whether a token file or a checkpoint cannot be read, as one that was cut short."""
        try:
            if name.endswith(".npy"):
                np.load(f"{self.path}/{name}")
            if name.endswith(".pt"):
                load_checkpoint(f"{self.path}/{name}")
        except Exception:  # a damaged file can fail in any way
            return True
        return False

    @contextlib.contextmanager
    def new_file(self, name):
        """A path to write the new file name to. Then its hash is recorded, and it is moved into place."""
        path = f"{self.path}/{name}"
        print(f"making {path}", flush=True)
        yield f"{path}.new"
        digest = file_hash(f"{path}.new")
        if self.files.setdefault(name, digest) != digest:
            self.refuse(f"had another {name} before: it came out different when it was made again")
        self.save()
        os.replace(f"{path}.new", path)

    def save_tokens(self, name, tokens):
        """Writes tokens (N, n, T), or the lengths (N,) of prompts, as the file name."""
        with self.new_file(name) as path, atomic_write(path) as f:
            np.save(f, np.asarray(tokens).astype(np.uint16, copy=False))
