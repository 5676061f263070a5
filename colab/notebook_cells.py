"""What the notebook's cells call beside the scripts: IPython loads it as an extension.

- `%%terminal` runs commands; a failure stops the notebook with a sentence, so that no later cell builds on it.
- Above what the commands print, it shows their progress, the memory in use, and a picture that grows meanwhile.
- Functions for what only the notebook's own process can do on Colab: mount the Drive, take photos in, give files out.
"""

from __future__ import annotations

import base64
import contextlib
import html
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from string import Formatter
from typing import Any

import pexpect
from IPython.display import HTML, display

DRIVE = "/content/drive"  # where Colab mounts it
SECONDS = 1.0  # between two looks at the memory and the picture
_IN_DOUBLE_QUOTES = re.compile(r'([\\"$`])')  # what a shell reads there
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")  # a terminal's colours and movements
_GIB_KIB, _GIB_MIB = 1024**2, 1024


class Stop(Exception):
    """Stops the notebook with its one sentence, without a traceback."""

    def _render_traceback_(self) -> list[str]:
        return [f"error: {self}"]


class _Expressions(Formatter):
    """`{NAME}` and `{NAME + 1}`, as in a line behind `!`; a value stays what it is in the shell's double quotes."""

    def get_field(self, field_name: str, args: Any, kwargs: Any) -> tuple[Any, str]:
        return eval(field_name, dict(kwargs)), field_name

    def format_field(self, value: Any, format_spec: str) -> str:
        return _IN_DOUBLE_QUOTES.sub(r"\\\1", format(value, format_spec))


def memory_in_use() -> Iterator[tuple[str, float, float]]:
    """Of the GPU and of the host: its name, the GiB in use, the GiB that there are."""
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=memory.used,memory.total", "--format=csv,noheader,nounits"]
        lines = subprocess.run(query, capture_output=True, text=True, check=False).stdout.splitlines()
        for number, line in enumerate(lines):
            with contextlib.suppress(ValueError):  # a GPU that does not tell
                used, total = (float(mib) / _GIB_MIB for mib in line.split(","))
                yield "GPU" if len(lines) == 1 else f"GPU {number}", used, total
    with contextlib.suppress(OSError, KeyError):  # not Linux
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        kib = {line.split(":")[0]: float(line.split()[1]) for line in lines}
        yield "host", (kib["MemTotal"] - kib["MemAvailable"]) / _GIB_KIB, kib["MemTotal"] / _GIB_KIB


def bars(rows: list[tuple[str, float, float]]) -> str:
    """A bar of HTML for each kind of memory."""
    cells = [
        f'<td style="text-align:left">{name}</td>'
        f'<td><progress value="{used:.2f}" max="{total:.2f}" style="width:16em"></progress></td>'
        f'<td style="text-align:left">{used:.1f} of {total:.1f} GiB</td>'
        for name, used, total in rows
    ]
    return "<table>" + "".join(f"<tr>{cell}</tr>" for cell in cells) + "</table>"


def picture_html(path: Path) -> str:
    """A WebP or PNG file inside HTML: Colab's IPython knows no WebP."""
    content = base64.b64encode(path.read_bytes()).decode("ascii")
    kind = path.suffix.removeprefix(".")
    return f'<img src="data:image/{kind};base64,{content}" style="max-width:100%" alt="{html.escape(path.name)}">'


class Shown:
    """What stands above the lines of a command: where it is, the memory, the picture.

    Args:
        picture: that the command writes again and again; None where there is none.
    """

    def __init__(self, picture: Path | None):
        self._path, self._written = picture, picture.stat().st_mtime_ns if picture and picture.is_file() else 0
        self._began = time.monotonic()
        self._status: Any = display(HTML(""), display_id=True)
        self._picture: Any = display(HTML(""), display_id=True) if picture else None

    def update(self, progress: str) -> None:
        """Shows the latest state of the command's progress bar."""
        line = f"<pre>{html.escape(progress)}</pre>" if progress else ""
        self._status.update(HTML(line + bars(list(memory_in_use()))))
        self._update_picture()

    def end(self) -> None:
        """Leaves the time that it took, and the last picture."""
        self._status.update(HTML(f"{time.monotonic() - self._began:.0f} s"))
        self._update_picture()

    def _update_picture(self) -> None:
        if self._path is None or not self._path.is_file():
            return
        written = self._path.stat().st_mtime_ns
        if written != self._written:
            self._written = written
            self._picture.update(HTML(picture_html(self._path)))


def run(command: str, picture: Path | None = None) -> int:
    """Runs a command line in a terminal of its own and prints its lines; returns its exit code.

    `python` is the notebook's own there, which on a machine of your own may be another than the shell's.

    What ends with a carriage return is the state of a progress bar: the latest alone is shown, above the lines.
    Stopping the cell types Ctrl-C into that terminal; so training saves a checkpoint.
    """
    options: dict[str, Any] = {"encoding": "utf-8", "codec_errors": "replace", "dimensions": (24, 100)}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    child = pexpect.spawn("/bin/sh", ["-ec", command], env={**os.environ, "NO_COLOR": "1", "PATH": path}, **options)
    shown, rest, looked, is_running = Shown(picture), "", 0.0, True
    while is_running:
        try:
            try:
                text = child.read_nonblocking(4096, timeout=SECONDS)
            except pexpect.TIMEOUT:
                text = ""
            except pexpect.EOF:
                text, is_running = "\n" if rest.strip() else "", False
            *lines, rest = re.split(r"\r?\n", rest + _ESCAPES.sub("", text))
            for line in lines:
                print(_last_state(line))
            if time.monotonic() - looked >= SECONDS:
                looked = time.monotonic()
                shown.update(_last_state(rest))
        except KeyboardInterrupt:
            child.sendintr()
    child.close()
    shown.end()
    return child.exitstatus if child.exitstatus is not None else 128 + child.signalstatus


def _last_state(line: str) -> str:
    """What a terminal would show of a line in which carriage returns stand."""
    return next((state.rstrip() for state in reversed(line.split("\r")) if state.strip()), "")


def terminal(line: str, cell: str) -> None:
    """The cell magic: `%%terminal`, or `%%terminal --picture FILE`.

    Raises:
        Stop: the commands failed.
    """
    from IPython import get_ipython

    command = _Expressions().vformat(cell, (), get_ipython().user_ns)
    words = shlex.split(line)
    picture = Path(words[1]) if words[:1] == ["--picture"] else None
    code = run(command.replace("\\\n", " ").strip(), picture)
    if code in (128 + 2, 128 + 15):
        raise Stop("it was stopped: run this cell again to go on")
    if code:
        raise Stop(f"the command ended with {code}: the reason is above; run this cell again once it is mended")


def subject_prompt(identifier: str, kind: str) -> str:
    """The prompt of all photos without a caption.

    Args:
        identifier: the rare word.
        kind: what the subject is one of.

    Raises:
        Stop: one is empty.
    """
    return f"a photo of {_typed('IDENTIFIER', identifier)} {_typed('CLASS', kind)}"


def validation_prompt(prompt: str, identifier: str, kind: str) -> str:
    """The prompt that is drawn, with the rare word and the class for `{}`.

    Raises:
        Stop: the rare word is not in it, so that it would never show the subject.
    """
    filled = _typed("VALIDATION_PROMPT", prompt).replace("{}", f"{identifier.strip()} {kind.strip()}")
    if identifier.strip() not in filled:
        raise Stop(
            f"VALIDATION_PROMPT {prompt!r} has no {{}}, the place of {identifier.strip()!r}, and would not show your "
            "subject: write it into the cell above, run that, and this one again"
        )
    return filled


def _typed(name: str, value: str) -> str:
    """A form's field without the spaces around it; not empty."""
    if not value.strip():
        raise Stop(f"{name} is empty: fill it in in the cell above, run that, and this one again")
    return value.strip()


def work_folder(folder: str, save_to_drive: bool, photos: str, drive: str = DRIVE) -> str:
    """The folder of all results; where it or that of the photos lies on the Drive, this is mounted.

    Args:
        folder: a name, or a full path.
        save_to_drive: whether a name is one on the Drive.
        photos: the folder of the photos.
        drive: where the Drive is mounted.

    Raises:
        Stop: the name is empty; or the Drive is not mounted: its folders would be the machine's own, which vanish with
            it.
    """
    folder = _typed("FOLDER", folder)
    path = Path(drive, "MyDrive") / folder if save_to_drive else Path.cwd().parent / folder
    for wanted in (path, Path(photos)):
        if wanted.is_relative_to(drive):
            _mount(drive, wanted)
    path.mkdir(parents=True, exist_ok=True)
    print(f"results go to {path}")
    return str(path)


def _mount(drive: str, wanted: Path) -> None:
    if os.path.ismount(drive):
        return
    reason = "only Colab has one"
    with contextlib.suppress(ImportError):
        from google.colab import drive as google_drive

        try:
            google_drive.mount(drive)
            reason = "it was not allowed"
        except Exception as error:  # whatever Colab says: it is shown
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if not os.path.ismount(drive):
        raise Stop(
            f"the Drive is not mounted ({reason}), and {wanted} would be a folder of this machine, which vanishes: run "
            "this cell again and allow it, or choose folders outside the Drive in the cell above"
        )


def upload(folder: str, wanted: bool) -> None:
    """Asks for photos, on Colab, if that is wanted; elsewhere says where to put them."""
    if not wanted:
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    try:
        from google.colab import files
    except ImportError:
        print(f"put your photos into {folder}")
        return
    before = os.getcwd()
    os.chdir(folder)  # older versions of Colab upload into the current folder alone
    try:
        files.upload()
    finally:
        os.chdir(before)


def show(path: str) -> None:
    """Shows a picture file."""
    display(HTML(picture_html(Path(path))))


def take_home(*paths: str) -> None:
    """Has the browser save files, on Colab; elsewhere prints where they are."""
    there = [path for path in paths if Path(path).is_file()]
    for path in paths:
        print(f"{path}: {Path(path).stat().st_size / 1e6:.1f} MB" if path in there else f"{path} is not there")
    with contextlib.suppress(ImportError):
        from google.colab import files

        for path in there:
            files.download(path)


def load_ipython_extension(ipython: Any) -> None:
    """What `%load_ext` calls."""
    ipython.register_magic_function(terminal, "cell")
