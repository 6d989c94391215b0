"""Record what the way back through the layers of a model needs, and how far a pass has come.

With a folder, an interrupted pass goes on from there: recorded inputs are files, and between two layers the state is
saved every now and then. Of two processes that make the same pass, the first has the folder; the other keeps nothing.
"""

import contextlib
import fcntl
import glob
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from linearize.checkpoint.writing import write_tensors

# bytes of layer inputs that stay in memory for the way back
RECORDED_BYTES = 256 << 20
# seconds of work that an interruption may cost, about
SAVE_SECONDS = 20.0


class LayerPass:
    """One pass through the layers, forward and perhaps backward.

    Args:
        folder: keeps the pass for the next process; None: it ends with this one.
        name: tells the passes of a folder apart.
    """

    def __init__(self, folder: Path | None = None, name: str = ""):
        self.name = name
        self._lock = None if folder is None else _locked(folder / f"{name}.lock")
        self.folder = None if self._lock is None else folder
        self.saved_at = time.monotonic()
        self.recorded_bytes = 0
        self.temporary: tempfile.TemporaryDirectory[str] | None = None

    def load(self, stage: str) -> tuple[int, dict[str, Tensor]]:
        """Return the number of layers that are done in a stage and the tensors of then; 0 and none without a save."""
        if self.folder is not None:
            with (
                contextlib.suppress(OSError, SafetensorError, ValueError, LookupError, TypeError),
                safe_open(self._state_file, framework="pt") as file,
            ):
                saved = file.metadata()
                if saved["stage"] == stage:
                    return int(saved["layers"]), {name: file.get_tensor(name) for name in file.keys()}
        return 0, {}

    def save(self, stage: str, layers: int, state: Callable[[], dict[str, Tensor]], *, now: bool = False) -> None:
        """Save `state` after `layers` layers of a stage, unless the last save is young. A full disk is no error.

        Args:
            now: save in any case.
        """
        if self.folder is None or not (now or time.monotonic() - self.saved_at >= SAVE_SECONDS):
            return
        partial = self._state_file.with_suffix(".partial")
        with contextlib.suppress(OSError, SafetensorError):
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state().items()}
            save_file(tensors, partial, metadata={"stage": stage, "layers": str(layers)})
            os.replace(partial, self._state_file)
        self.saved_at = time.monotonic()

    def record(self, hidden: Tensor, layer: int, row: int) -> Tensor | Path:
        """Keep the input of a layer: in memory, beyond RECORDED_BYTES or if the pass is kept in a file."""
        self.recorded_bytes += hidden.nbytes
        if self.folder is None and self.recorded_bytes <= RECORDED_BYTES:
            return hidden
        path = self.input_file(layer, row)
        write_tensors(path, {"hidden": hidden.contiguous().cpu()})
        return path

    def read_back(self, recorded: Tensor | Path) -> Tensor:
        """Return what `record` kept; a temporary file is removed."""
        if isinstance(recorded, Tensor):
            return recorded
        hidden = load_file(recorded)["hidden"]
        if self.folder is None:
            recorded.unlink()
        return hidden

    def input_file(self, layer: int, row: int) -> Path:
        """Return the file of a layer's recorded input."""
        folder = self.folder
        if folder is None:
            if self.temporary is None:  # removed with this pass, or at exit
                self.temporary = tempfile.TemporaryDirectory(prefix="linearize-activations-")
            folder = Path(self.temporary.name)
        return folder / f"{self.name}-input-{layer}-{row}.safetensors"

    def remove(self) -> None:
        """Remove what was kept; the pass is done."""
        if self.folder is not None and self._lock is not None:
            for file in self.folder.glob(f"{glob.escape(self.name)}[-.]*"):
                file.unlink(missing_ok=True)
            self._lock.close()

    @property
    def _state_file(self) -> Path:
        assert self.folder is not None
        return self.folder / f"{self.name}.safetensors"


def _locked(path: Path) -> IO[str] | None:
    """Return an open file that no other process has locked; None if one has, or if it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "w")  # noqa: SIM115  # open as long as the pass
    except OSError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    except OSError:  # this file system has no locks
        pass
    return file
