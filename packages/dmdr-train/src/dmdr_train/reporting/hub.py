"""Uploading an exported student to the Hugging Face hub."""

import re
from pathlib import Path

from dmdr_rewards.base.secrets import redacted

from dmdr_train.base.errors import UserError

KEY = "--push-to-hub"


def check(repository: str) -> None:
    """Check that a repository has a valid name, and that there is a token, before anything is written.

    Raises:
        UserError: one of them is missing.
    """
    import huggingface_hub

    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repository, re.ASCII):
        raise UserError(KEY, f"{repository!r} is not OWNER/NAME, such as me/sd3-4step")
    if huggingface_hub.get_token() is None:
        raise UserError(KEY, "there is no token of the hub; set HF_TOKEN, or run `hf auth login`")


def push(output: str | Path, repository: str, public: bool = False) -> str:
    """Upload a folder, or a single file, in one commit; returns the address of the repository.

    Args:
        repository: OWNER/NAME; it is made if it does not exist, otherwise it stays as public as it is.
        public: whether a new repository is public.

    Raises:
        UserError: the hub refuses, or cannot be reached; what was exported stays.
    """
    import huggingface_hub

    output = Path(output)
    try:
        hub = huggingface_hub.HfApi()
        address = hub.create_repo(repository, private=not public, exist_ok=True)
        if output.is_dir():
            hub.upload_folder(repo_id=repository, folder_path=output, commit_message="Student, by dmdr")
        else:
            hub.upload_file(
                repo_id=repository,
                path_or_fileobj=output,
                path_in_repo=output.name,
                commit_message="Student, by dmdr",
            )
    except Exception as error:  # of huggingface_hub or of its HTTP client, which is another in each version
        reason = redacted(str(error).strip().partition("\n")[0])
        raise UserError(KEY, f"{repository} was not uploaded ({reason}); {output} is written") from None
    return str(address)
