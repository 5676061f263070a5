"""A model's repository on the hub: checked and made before training, and filled after it."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from sd3_lora.common.command_line import Interrupted, UserError, counted, quoted, without_secrets
from sd3_lora.training.config import TrainingFlags
from sd3_lora.training.hub_flags import HubFlags
from sd3_lora.training.hub_folder import make_hub_folder

from accelerate import Accelerator
from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

_TOKENS = "https://huggingface.co/settings/tokens"
_LOG_IN = f"make a Write token at {_TOKENS} , then type `hf auth login`"


@dataclass(frozen=True)
class HubRepo:
    """A model's repository that is there, and that the token may write to.

    Attributes:
        api: with the token.
        repo_id: owner/name.
        url: of its page.
        is_private: whether only its owner sees it.
        has_login: whether the token is one that `hf` knows too, and not only that of a flag.
    """

    api: HfApi
    repo_id: str
    url: str
    is_private: bool
    has_login: bool

    def upload(self, folder: Path, message: str) -> str:
        """Uploads what is in the folder; what else is in the repository stays.

        Args:
            folder: whose content is to be there.
            message: of the commit.

        Returns:
            The page's address.

        Raises:
            UserError: it failed, whatever the reason; with the command that uploads it.
            Interrupted: likewise.
        """
        try:
            self.api.upload_folder(repo_id=self.repo_id, folder_path=folder, commit_message=message)
        except KeyboardInterrupt as error:
            raise Interrupted(
                f"{folder} is kept, but not uploaded; to upload it, type {self._command(folder)}"
            ) from error
        except Exception as error:  # of the library or the network, whatever it is: hours of work are on disk
            reason = _reason(error, self.api.token)
            sentence = f"{folder} is kept, but was not uploaded ({reason}): type {self._command(folder)}"
            raise UserError(sentence) from None
        return self.url

    def _command(self, folder: Path) -> str:
        private = ["--private"] if self.is_private else []
        login = "" if self.has_login else "`hf auth login`, then "
        return f"{login}`{quoted(['hf', 'upload', self.repo_id, str(folder), '.', *private])}`"


def open_repo(flags: HubFlags, output_dir: Path) -> HubRepo:
    """Checks the name and the token, and makes the repository if it is not there.

    An empty repository is the one proof that the token may write, and keeps the name.

    Args:
        flags: of the upload.
        output_dir: whose name is the repository's where none is given.

    Raises:
        UserError: the upload would fail.
    """
    name = flags.hub_model_id or output_dir.resolve().name
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"{name} is no name that the hub takes: type another as --hub_model_id") from error
    if constants.HF_HUB_OFFLINE:
        raise UserError(
            "--push_to_hub needs the hub, and HF_HUB_OFFLINE is set: unset it, or leave --push_to_hub out and add it "
            "later"
        )
    login = get_token()
    token = flags.hub_token.value if flags.hub_token else login
    if token is None:
        raise UserError(f"--push_to_hub needs a token: {_LOG_IN}")
    api = HfApi(token=token)
    try:
        owner = _writer(api)
        repo_id = name if "/" in name else f"{owner}/{name}"
        return _make_repo(api, repo_id, owner, flags.hub_private, token == login)
    except UserError:
        raise
    except Exception as error:  # of the library or the network
        reason, others = _reason(error, token), "type the same command later, or leave --push_to_hub out"
        raise UserError(f"the hub at {api.endpoint} cannot be used ({reason}): {others}") from None


def _writer(api: HfApi) -> str:
    """The user whose token it is, which may write."""
    try:
        user = api.whoami()
    except HfHubHTTPError as error:
        if error.response.status_code != 401:
            raise
        source = "that of HF_TOKEN; " if os.environ.get("HF_TOKEN") == api.token else ""
        raise UserError(f"the hub does not know this token ({source}it may have expired): {_LOG_IN}") from None
    with suppress(KeyError, TypeError):
        if user["auth"]["accessToken"]["role"] == "read":
            raise UserError(f"the token of {user['name']} may only read: {_LOG_IN}")
    return str(user["name"])


def _make_repo(api: HfApi, repo_id: str, user: str, private: bool, has_login: bool) -> HubRepo:
    other = f"type --hub_model_id {user}/NAME, or log in as another with `hf auth login`"
    forbidden = UserError(f"{user} may not write to {repo_id}: {other}")
    try:
        with suppress(KeyError, ValueError):  # the answer where there is one already
            api.create_repo(repo_id, private=private or None, exist_ok=True)
        info = api.model_info(repo_id)
        with suppress(TypeError):  # older versions of the library cannot ask
            api.auth_check(repo_id, write=True)
    except RepositoryNotFoundError:
        raise UserError(f"{repo_id} is taken on the hub by something that is no model: {other}") from None
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise forbidden from None
        raise
    if private and not info.private:
        raise UserError(
            f"{repo_id} is there already, and public: make it private at {api.endpoint}/{repo_id}/settings , type "
            "another --hub_model_id, or leave --hub_private out"
        )
    return HubRepo(api, repo_id, without_secrets(f"{api.endpoint}/{repo_id}"), bool(info.private), has_login)


def _reason(error: BaseException, token: str | bool | None) -> str:
    """The error's first line in plain text, without the token, should a library have put it there."""
    cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error  # of an upload's thread
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    if isinstance(cause, HfHubHTTPError):
        told = cause.server_message or (lines[0] if lines else "")
        status = str(cause.response.status_code)
        lines = [told if status in told else f"{status} {told}".strip()]
    line = (lines[0] if lines else type(cause).__name__).rstrip(".:")
    return line.replace(token, "***") if isinstance(token, str) and token else line


def open_hub(flags: TrainingFlags, accelerator: Accelerator) -> HubRepo | None:
    """The repository to upload to, on rank 0, if that is asked for; checked before anything is computed.

    Raises:
        UserError: the upload would fail.
    """
    if not (flags.hub.push_to_hub and accelerator.is_main_process):
        return None
    repo = open_repo(flags.hub, Path(flags.run.output_dir))
    print(f"after training: upload to {repo.url} ({'private' if repo.is_private else 'public'})")
    return repo


def upload(repo: HubRepo | None, flags: TrainingFlags, step: int) -> None:
    """Uploads the LoRA and what belongs to it, as the last thing of all: no failure here can lose it."""
    if repo:
        folder = make_hub_folder(Path(flags.run.output_dir), repo.repo_id, flags.hub.hub_checkpoints)
        what = "transformer" if flags.trains_all else "LoRA"
        print(f"uploaded {folder} to {repo.upload(folder, what + ' after ' + counted(step, 'step'))}")
