"""
A data folder and its settings.json: {"settings": {name: value}, "inputs": {name: sha256 of what the folder was made
from}, "files": {name: sha256 of each file in it that is ours}}.
"""
import contextlib
import json
import os

import numpy as np

from model import UserError, atomic_write, file_hash


class DataFolder:
    """
    Settings, inputs and files of the data folder at path. A file is listed in settings.json before it is moved into
    place: so an interrupted run of ours continues where it was, and a file that is not listed is the user's.
    """

    def __init__(self, path):
        self.path = path
        self.as_read = self.read()
        self.settings, self.inputs, self.files = (dict(part) for part in self.as_read)

    def read(self):
        """settings.json -> settings, inputs, files; empty where there is none."""
        if not self.has("settings.json"):
            return {}, {}, {}
        try:
            with open(f"{self.path}/settings.json") as f:
                content = json.load(f)
            return dict(content["settings"]), dict(content["inputs"]), dict(content["files"])
        except (ValueError, LookupError, TypeError):
            raise UserError(f"{self.path}/settings.json is damaged, or not of this version of prepare_data.py: "
                            f"delete {self.path}, or name another --data.") from None

    def save(self):
        content = dict(settings=self.settings, inputs=self.inputs, files=self.files)
        with atomic_write(f"{self.path}/settings.json") as f:
            f.write(json.dumps(content, indent=1).encode())

    def has(self, *names):
        return all(os.path.exists(f"{self.path}/{name}") for name in names)

    def merge_settings(self, given, defaults):
        """
        Each setting: what is given (not None), else what the folder was made with, else its default. Refuses what is
        given where the folder was made with another value; None was not known then, and may be set now.
        """
        for name, value in given.items():
            recorded = self.settings.get(name)
            if value is not None and recorded not in (None, value):
                raise UserError(f"{self.path} was made with {name} {recorded}, not {value}: name another --data, or "
                                f"delete {self.path}.")
            if value is None:
                value = recorded if recorded is not None else defaults.get(name)
            self.settings[name] = value

    def add_input(self, name, digest):
        """Records what the folder is made from; refuses it where it has changed."""
        if self.inputs.setdefault(name, digest) != digest:
            raise UserError(f"{self.path} was made from another {name} (its sha256 differs): restore it, name another "
                            f"--data, or delete {self.path}.")

    def check_files(self, names, published):
        """
        Refuses to replace a file of the user's: one of names that exists and is not listed, or has changed. published:
        name -> sha256 of a file that the user may have downloaded and put there, which becomes ours.
        """
        for name in dict.fromkeys([*names, *self.files]):
            if not self.has(name):
                continue
            digest = file_hash(f"{self.path}/{name}")
            if digest == published.get(name):
                self.files[name] = digest
            if digest != self.files.get(name):
                raise UserError(f"{self.path}/{name} was not written by prepare_data.py, or was changed since: move or "
                                "delete it, or name another --data.")

    @contextlib.contextmanager
    def lock(self):
        """Creates the folder and keeps other processes from writing to it. Leaves no trace where no file was made."""
        try:
            os.makedirs(self.path, exist_ok=True)
            f = open(f"{self.path}/.lock", "a")
        except OSError as error:
            raise UserError(f"{self.path} cannot be written ({error.strerror}): name another --data.") from None
        with f:
            try:
                import fcntl  # not on Windows, where nothing is locked
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except ImportError:
                pass
            except BlockingIOError:
                raise UserError(f"another prepare_data.py is writing to {self.path}: wait for it.") from None
            try:
                if self.read() != self.as_read:
                    raise UserError(f"another prepare_data.py has just changed {self.path}: start again.")
                yield
            finally:
                os.remove(f"{self.path}/.lock")
                with contextlib.suppress(OSError):  # it is not empty
                    os.rmdir(self.path)

    @contextlib.contextmanager
    def new_file(self, name):
        """A path to write the new file name to. Then its hash is recorded, and it is moved into place."""
        path, temporary = f"{self.path}/{name}", f"{self.path}/{name}.new"
        print(f"making {path}", flush=True)
        yield temporary
        digest = file_hash(temporary)
        if self.files.get(name, digest) != digest and self.has_later_files(name):
            os.remove(temporary)
            raise UserError(f"{path} was missing and came out different when it was made again, but other files were "
                            f"made from the first: name another --data, or delete {self.path}.")
        self.files[name] = digest
        self.save()
        os.replace(temporary, path)

    def has_later_files(self, name):
        names = list(self.files)  # in the order they were made
        return any(self.has(later) for later in names[names.index(name) + 1:])

    def save_tokens(self, name, tokens):
        """Writes tokens (N, n, T) as the token file name."""
        with self.new_file(name) as path, atomic_write(path) as f:
            np.save(f, np.asarray(tokens).astype(np.uint16))
