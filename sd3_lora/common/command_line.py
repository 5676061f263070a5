"""The command line: flags from dataclasses, and one sentence for each error that a user can cause.

Importing this takes a tenth of a second, so that a mistyped flag and `--help` are answered at once: the scripts call
`CommandLine.answer_at_once` before they import torch.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import importlib
import os
import re
import shlex
import shutil
import signal
import sys
import traceback
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from sd3_lora.common.atomic_files import remove_unfinished, replacing, unfinished_path
from sd3_lora.common.dataclass_flags import add_flags
from sd3_lora.common.short_help import SHORT_HELP, help_lines

EXIT_USER_ERROR, EXIT_INTERRUPTED = 2, 130
MOST_SHOWN = 10  # names or faults in one message about a user's files
# Flags that name a file or folder, in which `~` is expanded.
PATH_FLAGS = {
    "cache_dir",
    "class_data_dir",
    "class_prompts_file",
    "concepts_list",
    "data_df_path",
    "dataset_name",
    "file",
    "identifier_embedding",
    "init_lora",
    "instance_data_dir",
    "latents_path",
    "logging_dir",
    "lora",
    "mask_data_dir",
    "outdir",
    "output",
    "output_dir",
    "output_path",
    "parts",
    "pretrained_model_name_or_path",
    "prior_prompts_file",
    "prompts_file",
    "resume_from_checkpoint",
    "validation_prompts_file",
}
SECRET_FLAGS = {"hub_token"}  # in no command that is printed, and in no record of the command line
_SECRET_VARIABLES = re.compile(r"(_TOKEN|_API_KEY|_PASSWORD|_SECRET)$")
_SECRET_TEXTS = re.compile(
    r"\bhf_[A-Za-z0-9]{20,}|(?:(?<=://)|(?<=https:/))[^/\s@'\"]+(?=@)"
)  # a hub's token; user:password in a URL
# Other trainers' name of a flag → its names here, of which the script's first one is suggested.
OTHER_NAMES = {
    "batch_size": ("train_batch_size", "vae_batch_size"),
    "caption_dropout_probability": ("caption_dropout",),
    "caption_dropout_rate": ("caption_dropout",),
    "cfg_scale": ("guidance",),
    "clip_g_dropout_rate": ("clip_g_dropout",),
    "clip_l_dropout_rate": ("clip_l_dropout",),
    "data_dir": ("instance_data_dir",),
    "data_df_path": ("output_path",),
    "embeddings_path": ("data_df_path", "output_path"),
    "epochs": ("num_train_epochs",),
    "flip_aug": ("random_flip",),
    "flow_shift": ("timestep_shift",),
    "guidance_scale": ("guidance",),
    "image_dir": ("instance_data_dir",),
    "image_format": ("format",),
    "image_size": ("resolution", "height"),
    "instance_prompt": ("prompt",),
    "latents_path": ("output_path",),
    "keep_tokens": ("keep_tags",),
    "log_with": ("report_to",),
    "lora_dir": ("lora",),
    "lora_path": ("lora",),
    "lora_rank": ("rank",),
    "lora_strength": ("lora_scale",),
    "lora_weight": ("lora_scale",),
    "lora_weights": ("lora",),
    "lr": ("learning_rate",),
    "max_epochs": ("num_train_epochs",),
    "max_token_length": ("max_sequence_length",),
    "max_train_epochs": ("num_train_epochs",),
    "model": ("pretrained_model_name_or_path",),
    "model_id": ("pretrained_model_name_or_path",),
    "model_path": ("pretrained_model_name_or_path",),
    "network_alpha": ("lora_alpha",),
    "network_dim": ("rank",),
    "network_dropout": ("lora_dropout",),
    "num_images_per_prompt": ("num_images",),
    "num_inference_steps": ("num_steps",),
    "num_validation_images": ("num_images",),
    "optimizer_type": ("optimizer",),
    "out_dir": ("outdir", "output_dir", "output_path"),
    "outdir": ("output_dir", "output_path"),
    "output": ("output_path", "output_dir", "outdir"),
    "output_dir": ("outdir", "output_path"),
    "output_format": ("format",),
    "output_path": ("outdir", "output_dir"),
    "prompt": ("instance_prompt",),
    "prompts": ("prompts_file",),
    "resume": ("resume_from_checkpoint",),
    "sample_prompts": ("prompts_file",),
    "sampler": ("scheduler",),
    "sampler_name": ("scheduler",),
    "scale": ("lora_scale",),
    "shift": ("timestep_shift",),
    "shuffle_caption": ("shuffle_tags",),
    "skip_layers": ("skip_guidance_layers",),
    "steps": ("num_steps", "max_train_steps"),
    "t5_dropout_rate": ("t5_dropout",),
    "train_batch_size": ("batch_size",),
    "train_data_dir": ("instance_data_dir",),
    "unet_lr": ("learning_rate",),
    "validation_prompt": ("prompt",),
}


# Flags of another script of ours, or for other data: what is spelt like them means something else.
NO_GUESS = {
    "class_data_dir",
    "class_prompt",
    "num_class_images",
    "recompute_blocks",
    "offload_inputs",
    "modulations_ahead",
    "stream_text_encoders",
}


_OPENING_QUOTES, _CLOSING_QUOTES = "'‘“„«", "'’”“»"
_SMALL_WORDS = {"a", "an", "and", "at", "in", "of", "on", "the", "with"}  # no prompt by themselves


class Secret:
    """The value of a flag that is shown nowhere: not printed, and not written with the other flags.

    It is no dataclass: `asdict` would write its field.

    Args:
        value: as typed.
    """

    def __init__(self, value: str):
        self.value = value

    def __repr__(self) -> str:
        return "***"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and self.value == other.value

    def __hash__(self) -> int:
        return hash(self.value)


_DISK_FAULTS = {
    errno.ENOSPC: "the disk is full: free some space",
    getattr(errno, "EDQUOT", errno.ENOSPC): "your share of the disk is full: free some space",
    errno.EFBIG: "the disk, or a limit of yours (ulimit -f), does not take so large a file: lift it",
    errno.EROFS: "the disk can only be read: have it mounted for writing",
    errno.EIO: "the disk has failed (input/output error): put another in its place",
}
# What torch, its libraries and Python say where the host has no more memory; most of Python says MemoryError.
_HOST_MEMORY_SIGNS = (
    *("DefaultCPUAllocator", "std::bad_alloc", os.strerror(errno.ENOMEM)),
    *("could not create a primitive", "can't start new thread", "Failed to launch worker thread"),
)


class UserError(Exception):
    """Something that the user can mend: one sentence saying what is wrong and what to type."""


class Interrupted(KeyboardInterrupt):
    """An interruption in good order: one sentence that says what is kept, and what to type to go on.

    Args:
        sentence: for the user.
        number: of the signal.
    """

    def __init__(self, sentence: str, number: int = signal.SIGINT):
        super().__init__(sentence)
        self.number = number


class WrongFlags(ValueError):
    """What a group of flags finds wrong with its values, a sentence each."""

    def __init__(self, faults: Sequence[str]):
        super().__init__("; ".join(faults))
        self.faults = tuple(faults)


def require_right(faults: Iterable[str]) -> None:
    """For a group's `__post_init__`: reports all faults at once.

    Raises:
        WrongFlags: there is any fault.
    """
    all_faults = tuple(faults)
    if all_faults:
        raise WrongFlags(all_faults)


def all_of(faults: Sequence[str], noun: str, most: int | None = None) -> str:
    """One message of all faults: a single one as it is, several below each other.

    Args:
        faults: a sentence each.
        noun: what is wrong.
        most: how many are shown; None shows all.
    """
    if len(faults) == 1:
        return faults[0]
    others = [f"and {len(faults) - most} more"] if most is not None and len(faults) > most else []
    return "\n  ".join([f"{len(faults)} things are wrong with {noun}:", *faults[:most], *others])


def counted(count: int, noun: str) -> str:
    """A number with its noun, which is given in the singular: "1 picture", "2 class pictures", "3 processes"."""
    if count == 1:
        return f"1 {noun}"
    return f"{count} {noun}" + ("es" if noun.endswith("s") else "s")


def first_line(error: BaseException) -> str:
    """What an error says, in one line; its kind where it says nothing."""
    return without_secrets((str(error).strip() or type(error).__name__).splitlines()[0])


def without_secrets(text: str) -> str:
    """A text with `***` for tokens of the environment, tokens of the hub, and names and passwords in URLs."""
    values = (value for name, value in os.environ.items() if _SECRET_VARIABLES.search(name.upper()))
    for value in sorted(values, key=len, reverse=True):
        if len(value) >= 8:  # a shorter one may be any word
            text = text.replace(value, "***")
    return _SECRET_TEXTS.sub("***", text)


def _print_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """In place of Python's own, which prints whatever secret a library has put into an error."""
    sys.stderr.write(without_secrets("".join(traceback.format_exception(kind, error, trace))))


def shown(names: Sequence[str]) -> str:
    """The first names of a list, for a sentence, and how many more there are."""
    others = f" and {len(names) - MOST_SHOWN} more" if len(names) > MOST_SHOWN else ""
    return ", ".join(names[:MOST_SHOWN]) + others


def less_than_one(group: object, *names: str) -> Iterator[str]:
    """A fault for each of these flags that is set and less than 1."""
    for name in names:
        value = getattr(group, name)
        if value is not None and value < 1:
            yield f"--{name} {value} must be at least 1"


def split_prompt(flag: str, prompts: Sequence[str]) -> Iterator[str]:
    """A fault where a shell has cut one prompt into words, each of which would be a prompt.

    To cmd.exe a single quote is a letter, so `'a photo'` arrives as `'a` and `photo'`.
    """
    is_quoted = len(prompts) > 1 and prompts[0][:1] in _OPENING_QUOTES and prompts[-1][-1:] in _CLOSING_QUOTES
    are_words = len(prompts) > 2 and not any(" " in prompt for prompt in prompts)
    if is_quoted or (are_words and not _SMALL_WORDS.isdisjoint(map(str.lower, prompts))):
        meant = " ".join(prompts).strip(_OPENING_QUOTES + _CLOSING_QUOTES)
        yield f'--{flag} has {len(prompts)} prompts, of which the first is {prompts[0]}: type --{flag} "{meant}"'


@dataclass(frozen=True)
class HarmlessFlag:
    """A flag of diffusers' scripts that changes nothing here, and is taken with a note.

    Attributes:
        note: why it changes nothing.
        takes_value: whether a value follows it.
        only: the one value for which that is so; None for any.
        otherwise: what to do where another value was meant.
    """

    note: str
    takes_value: bool = False
    only: str | None = None
    otherwise: str = ""


@dataclass(frozen=True)
class CommandLine:
    """The flags of a script.

    `--help` shows those that most people need, where `SHORT_HELP` has the script; `--help_all` all of them.

    Attributes:
        script: the file name that the user types.
        description: the script's docstring, whose first line the help shows.
        groups: frozen dataclasses, whose fields are flags with their help in the metadata; each is a part of
            `--help_all` under the first sentence of its docstring.
        refused: flags that diffusers' scripts know and this one does not have, each with what to do instead.
        harmless: flags of those that are taken with a note.
        first: the flag whose value the first argument is, where that is no flag.
    """

    script: str
    description: str
    groups: tuple[type, ...]
    refused: Mapping[str, str] = field(default_factory=dict)
    harmless: Mapping[str, HarmlessFlag] = field(default_factory=dict)
    first: str | None = None

    def answer_at_once(self) -> None:
        """Ends the process, before anything heavy is imported, where the command line is wrong or asks for help.

        An interruption meanwhile gets its sentence instead of a traceback. Of several processes rank 0 alone answers,
        and its launcher ends the others.
        """
        signal.signal(signal.SIGINT, _end_on_interrupt)
        if not _is_rank_0():
            return
        try:
            self.parse(None, report=lambda _: None)
        except UserError as error:
            print(f"error: {without_secrets(str(error))}", file=sys.stderr)
            sys.exit(EXIT_USER_ERROR)

    def parse(self, argv: Sequence[str] | None, report: Callable[[str], None] | None = None) -> tuple[Any, ...]:
        """One instance of each group.

        Args:
            argv: the arguments; None means those of the process.
            report: is given each note; None prints it, in rank 0.

        Raises:
            UserError: all that is wrong with the command line, a sentence each.
        """
        given = list(sys.argv[1:] if argv is None else argv)
        if self.script in SHORT_HELP and not {"-h", "--help"}.isdisjoint(given):
            print(*help_lines(self.script, self.description.splitlines()[0], SHORT_HELP[self.script]), sep="\n")
            sys.exit(0)
        parser = self._parser()
        faults: list[str] = []
        if self.first and given and not given[0].startswith("-"):
            given.insert(0, f"--{self.first}")
        arguments = list(self._without_known_others(given, faults, report or print_in_rank_0))
        try:
            values, unknown = parser.parse_known_args(arguments)
        except _ParserError as error:  # argparse reads no further
            raise UserError(all_of([*faults, *parser.faults, str(error)], "the command line")) from error
        faults += parser.faults
        flags = [argument for argument in unknown if argument.startswith("--")]  # others may be their values
        faults += [self._about_unknown(flag, parser) for flag in flags]
        if unknown and not flags:
            faults.append(f"unknown argument {unknown[0]}: {self._about_more(arguments, unknown)}")
        groups = []
        for group in self.groups:
            names = [flag.name for flag in fields(group)]
            try:
                groups.append(group(**{name: _expanded(name, getattr(values, name)) for name in names}))
            except WrongFlags as error:
                faults += error.faults
            except ValueError as error:
                faults.append(str(error))
        if faults:
            raise UserError(all_of(faults, "the command line"))
        return tuple(groups)

    def _about_more(self, arguments: Sequence[str], unknown: Sequence[str]) -> str:
        """What to do about arguments behind all that is taken."""
        if unknown == arguments:
            return self._help_hint
        if self.first and arguments[0] == f"--{self.first}" and arguments[2] == unknown[0]:
            whole = " ".join([arguments[1], *unknown])
            if os.path.exists(os.path.expanduser(whole)):
                return f'put double quotes around "{whole}"'
            return f"--{self.first} is one, here {arguments[1]}: type the command once for each"
        return f"put double quotes around a value of several words; {self._help_hint}"

    def _parser(self) -> _Faults:
        parser = _Faults(
            prog=self.script,
            usage=f"python %(prog)s{' ' + self.first.upper() if self.first else ''} [flags]",
            description=self.description.splitlines()[0],
            formatter_class=_Help,
            allow_abbrev=False,
            add_help=False,
        )
        for group in self.groups:
            add_flags(parser, group, (group.__doc__ or "").splitlines()[0].rstrip(".:"))
        parser.add_argument("-h", "--help", "--help_all", "--help-all", action="help", help="Show this and exit.")
        return parser

    @property
    def _help_hint(self) -> str:
        return f"`python {self.script} --help_all` lists the flags"

    def _without_known_others(
        self, argv: Sequence[str], faults: list[str], report: Callable[[str], None]
    ) -> Iterator[str]:
        """The arguments without the known flags of other scripts, whose faults are added to `faults`."""
        arguments = deque(argv)
        while arguments:
            argument = arguments.popleft()
            name, equals, value = argument.partition("=")
            name = name.replace("-", "_").lstrip("_")
            if not argument.startswith("--") or (name not in self.refused and name not in self.harmless):
                yield argument
                continue
            if name in self.refused:
                faults.append(f"--{name} is not part of {self.script}: {self.refused[name]}")
                while arguments and not arguments[0].startswith("--"):  # the flag's values
                    arguments.popleft()
                continue
            flag = self.harmless[name]
            if flag.takes_value and not equals:
                value = arguments.popleft() if arguments and not arguments[0].startswith("--") else ""
            if flag.takes_value and not value:
                faults.append(f"argument --{name}: expected one argument")
            elif flag.only is not None and value != flag.only:
                faults.append(f"--{name} {value} is not part of {self.script}: {flag.otherwise}")
            else:
                report(f"note: --{name} changes nothing: {flag.note}")

    def _about_unknown(self, argument: str, parser: argparse.ArgumentParser) -> str:
        flag = argument.split("=", 1)[0]
        known = [name for name in parser._option_string_actions if "-" not in name[2:]]  # each has a twin with hyphens
        name = flag.lstrip("-").replace("-", "_")
        others = [f"--{other}" for other in OTHER_NAMES.get(name, ()) if f"--{other}" in known]
        # A name that means something else here than any flag gets no guess.
        near = (
            others if name in OTHER_NAMES or name in NO_GUESS else difflib.get_close_matches(f"--{name}", known, 1, 0.7)
        )
        return f"unknown argument {flag}: " + (f"type {near[0]}" if near else self._help_hint)


class _ParserError(Exception):
    """A fault after which argparse cannot go on."""


class _Faults(argparse.ArgumentParser):
    """argparse that notes a value it cannot take, or lacks, and goes on."""

    def __init__(self, *args: Any, **kwargs: Any):
        self.faults: list[str] = []
        super().__init__(*args, **kwargs)

    def _match_argument(self, action: argparse.Action, arg_strings_pattern: str) -> int:
        try:
            return super()._match_argument(action, arg_strings_pattern)
        except argparse.ArgumentError as error:
            self._note(error)
            return 0

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        if not arg_strings and action.nargs in (None, argparse.ONE_OR_MORE):
            return action.default  # `_match_argument` has noted that there is none
        try:
            return super()._get_values(action, arg_strings)
        except argparse.ArgumentError as error:
            self._note(error)
            return action.default

    def _note(self, error: argparse.ArgumentError) -> None:
        """Notes a fault under the flag's first name alone; argparse names them all."""
        names, slash, _ = (error.argument_name or "").partition("/")
        self.faults.append(f"argument {names}: {error.message}" if slash else str(error))

    def error(self, message: str) -> NoReturn:
        raise _ParserError(message)


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """One line for each flag, without its twin with hyphens, and without empty defaults."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        names = ", ".join(name for name in action.option_strings if "-" not in name.lstrip("-"))
        if action.nargs == 0 or action.const is True:
            return names
        return f"{names} {self._format_args(action, action.dest.upper())}"

    def _get_help_string(self, action: argparse.Action) -> str | None:
        is_empty = action.default is None or action.default is False or action.default in ([], "")
        return action.help if is_empty else super()._get_help_string(action)


def _expanded(name: str, value: Any) -> Any:
    """The value, with `~` expanded in flags that name files."""
    if name not in PATH_FLAGS:
        return value
    if isinstance(value, list):
        return [os.path.expanduser(each) for each in value]
    return os.path.expanduser(value) if isinstance(value, str) else value


def _is_rank_0() -> bool:
    """Whether this is rank 0 under torchrun or accelerate launch, before torch is imported."""
    return os.environ.get("RANK", "0") == "0"


def print_in_rank_0(line: str) -> None:
    """Prints a line once, where torchrun or accelerate launch started several processes."""
    if _is_rank_0():
        print(line)


def _end_on_interrupt(*_: object) -> NoReturn:
    """Ends the process at once: nothing has begun, and an import of a library may swallow an exception."""
    if _is_rank_0():
        print("\ninterrupted: run the same command again", file=sys.stderr, flush=True)
    os._exit(EXIT_INTERRUPTED)


def exit_code(script: Callable[[Sequence[str] | None], None], argv: Sequence[str] | None, smaller: str = "") -> int:
    """Runs a script's body and turns an error that the user can mend into its sentence on stderr and exit code 2.

    Args:
        script: the body.
        argv: its arguments.
        smaller: the flags to try when the GPU's memory runs out.
    """
    from safetensors import SafetensorError

    for library in ("transformers", "diffusers"):
        if library in sys.modules:  # else the script does not use it
            # A progress bar for each file would bury the scripts' output.
            importlib.import_module(f"{library}.utils.logging").disable_progress_bar()
    if not sys.stderr.isatty():
        importlib.import_module("huggingface_hub.utils").disable_progress_bars()  # of downloads: they draw no lines
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # A Windows console of another code page must not turn a prompt into a crash. In a pipe both come in order.
            stream.reconfigure(errors="replace", line_buffering=True)
    sys.excepthook = _print_traceback
    try:
        if signal.getsignal(signal.SIGINT) in (_end_on_interrupt, signal.SIG_DFL):
            signal.signal(signal.SIGINT, signal.default_int_handler)
        script(argv)
    except (UserError, MemoryError, RuntimeError, OSError, SafetensorError) as error:
        sentence = _sentence_of(error, smaller)
        if sentence is None:
            raise
        print(f"error: {without_secrets(sentence)}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt as error:
        in_order = _interruption_in_order(error)
        if in_order:
            if _is_rank_0():
                with suppress(OSError):  # the terminal of a SIGHUP is gone
                    print(f"\ninterrupted: {in_order}", file=sys.stderr)
            return 128 + in_order.number
        print("\ninterrupted: run the same command again to go on", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


def _sentence_of(error: BaseException, smaller: str) -> str | None:
    """What is said of an error that the user can mend; None of any other.

    Args:
        error: that ended a script.
        smaller: the flags to try when memory runs out.
    """
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        reason = ". ".join(str(error).split(". ")[:2])  # "CUDA out of memory. Tried to allocate 2.00 GiB"
        return f"{reason}: try {smaller}"
    if fault := host_memory_fault(error):
        flags = f", or try {smaller}" if smaller else ""
        return f"{fault}: close other programs and type the same command again{flags}"
    if isinstance(error, UserError):
        return str(error)
    fault = disk_fault(error)
    return fault and f"{fault} and type the same command again"


def disk_fault(error: BaseException) -> str | None:
    """What is wrong with the disk, and what to do; None where the error is no disk's.

    Args:
        error: an OSError, or a library's error with the words of one.
    """
    number = error.errno if isinstance(error, OSError) else None
    for each, fault in _DISK_FAULTS.items():
        if number == each or (number is None and os.strerror(each) in str(error)):
            return fault
    return None


def host_memory_fault(error: BaseException | None) -> str | None:
    """That the host's memory ran out, and how much was asked for; None where it did not.

    Args:
        error: whatever was raised. It is followed to its causes: a reader may take a file that it has no memory to
            read for a damaged one.
    """
    for each in _chain(error, lambda each: each.__cause__):
        said = "" if isinstance(each, UserError) else str(each)
        if isinstance(each, MemoryError) or any(sign in said for sign in _HOST_MEMORY_SIGNS):
            asked = re.search(r"tried to allocate (\d+) bytes", said)
            reason = f"{int(asked[1]) / 2**20:.1f} MiB more were asked for" if asked else first_line(each)
            return f"the host's memory ran out ({reason})"
    return None


def _chain(
    error: BaseException | None, before: Callable[[BaseException], BaseException | None]
) -> Iterator[BaseException]:
    """An error and those that led to it, each once: `raise error from error` makes an error its own cause."""
    seen = set[int]()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = before(error)


def _interruption_in_order(error: BaseException | None) -> Interrupted | None:
    """The `Interrupted` that ended a script, also where Ctrl-C came once more while it was on its way out."""
    chain = _chain(error, lambda each: each.__context__)
    return next((each for each in chain if isinstance(each, Interrupted)), None)


def command_words(script: str, **flags: Any) -> list[str]:
    """The script and its arguments; None, False and empty lists are left out."""
    arguments = [script]
    for name, value in flags.items():
        if value is None or value is False or value == []:
            continue
        values = [] if value is True else value if isinstance(value, list) else [value]
        arguments += [f"--{name}", *map(str, values)]
    return arguments


def command(script: str, **flags: Any) -> str:
    """The command line that a message asks the user to type, quoted as the system's shell reads it.

    >>> command("inference.py", lora="my lora", num_images=2)
    "python inference.py --lora 'my lora' --num_images 2"
    """
    return quoted(["python", *command_words(script, **flags)])


def quoted(words: Iterable[str]) -> str:
    """Words as one command line, quoted as the system's shell reads them."""
    quote = _quote_for_cmd if os.name == "nt" else shlex.quote
    return " ".join(map(quote, words))


def forget_secrets() -> None:
    """Takes the flags of SECRET_FLAGS out of `sys.argv`, which trackers write down."""
    sys.argv[1:] = _without(SECRET_FLAGS, sys.argv[1:])


def _without(flags: Collection[str], argv: Sequence[str]) -> list[str]:
    """The arguments without some flags that take one value each."""
    arguments, kept = deque(argv), list[str]()
    while arguments:
        argument = arguments.popleft()
        name, equals, _ = argument.partition("=")
        if not argument.startswith("--") or name.lstrip("-").replace("-", "_") not in flags:
            kept.append(argument)
        elif not equals and arguments:
            arguments.popleft()  # its value
    return kept


def command_again(script: str, argv: Sequence[str] | None, **changed: str) -> str:
    """The command line that was typed, with some flags changed, and without those of SECRET_FLAGS.

    Args:
        script: its name.
        argv: its arguments; None means those of the process.
        changed: flag → its value. Each of these flags takes one value.
    """
    kept = _without({*changed, *SECRET_FLAGS}, sys.argv[1:] if argv is None else argv)
    processes = os.environ.get("LOCAL_WORLD_SIZE")  # set by torchrun and accelerate launch
    launcher = ["torchrun", "--nproc-per-node", processes] if processes else ["python"]
    return quoted([*launcher, script, *kept, *command_words("", **changed)[1:]])


def _quote_for_cmd(argument: str) -> str:
    """In double quotes unless it needs none: to cmd.exe a single quote is a letter, and & ends a command."""
    if re.fullmatch(r"[\w@+=:,./\\-]+", argument):
        return argument
    inner = re.sub(r'(\\*)"', r'\1\1\\"', argument)  # backslashes count double before a quote, as C programs read them
    return '"' + re.sub(r"(\\+)$", r"\1\1", inner) + '"'


def require_writable_folder(folder: Path) -> None:
    """Makes `folder` and tries to write in it, so that hours of work do not end in a refusal.

    Raises:
        UserError: it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_unfinished(folder, "writable")
        probe = unfinished_path(folder / "writable")
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({error.strerror}): give another folder") from error


def write_atomically(path: Path, content: bytes) -> None:
    """Writes to a temporary name beside `path` and renames it; an attempt that fails leaves nothing."""
    with replacing(path) as unfinished:
        unfinished.write_bytes(content)


def link_or_copy(source: Path, path: Path) -> None:
    """A second name for a file, or a copy where it cannot have one: on another disk, or one without links."""
    path.parent.mkdir(parents=True, exist_ok=True)
    source = source.resolve()  # in the hub's cache a file is a link
    try:
        os.link(source, path)
    except OSError:
        shutil.copyfile(source, path)


def write_text_atomically(path: Path, text: str) -> None:
    """Likewise, UTF-8 with the line ends of the system."""
    write_atomically(path, text.replace("\n", os.linesep).encode())


def read_text_lines(path: Path) -> list[str]:
    """The non-empty lines of a UTF-8 text file; a BOM and Windows' line ends are tolerated.

    Other separators that Unicode knows (U+2028, U+0085, a form feed) stand inside a line, as JSON has it.

    Raises:
        UserError: the file is missing or not UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): check the path") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: save it again as UTF-8") from error
    if "\0" in text:  # to a decoder of UTF-8 every second byte of UTF-16 without a mark is a letter
        raise UserError(f"{path} holds NUL bytes, as UTF-16 text does: save it again as UTF-8")
    return [line.strip() for line in text.split("\n") if line.strip()]
