"""Single files of a Hugging Face hub repository, fetched only when a stage needs them. Free of torch.

huggingface_hub is imported when a file is fetched: without a hub id, nothing here touches the network.
"""

import errno
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from sd3pipe import stopping
from sd3pipe.errors import InputError, NetworkError
from sd3pipe.files import storage_error

_HUB_ID = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[\w./-]+))?")
_FILE_SUFFIX = re.compile(r"\.(safetensors|ckpt|pt|pth|bin|gguf|json|toml)$", re.IGNORECASE)


def is_hub_id(text: str) -> bool:
    """Whether a text that is no existing path is meant as a hub id: OWNER/NAME or OWNER/NAME@REVISION.

    If a folder OWNER exists here, a path was meant and mistyped: that must not reach the network.
    """
    found = _HUB_ID.fullmatch(text)
    return bool(found) and not _FILE_SUFFIX.search(text) and not Path(text.split("/")[0]).exists()


class HubRepository:
    """A model repository on the hub. `unreachable` says why a file could be neither fetched nor found in the cache."""

    def __init__(self, hub_id: str) -> None:
        found = _HUB_ID.fullmatch(hub_id)
        assert found, hub_id
        self.repo, self.revision = found["repo"], found["revision"]
        self.unreachable: str | None = None

    def fetch(self, name: str) -> Path | None:
        """Returns a file's path in the local hub cache, downloading it if need be; None if there is no such file.

        None also where the hub cannot be reached and the cache has no such file: `unreachable` is set then. Raises
        NetworkError for a gated or missing repository and for a hub that answers with an error.
        """
        from huggingface_hub import hf_hub_download

        return self._got(name, lambda: hf_hub_download(self.repo, name, revision=self.revision))

    def fetch_all(self, patterns: Sequence[str]) -> Path:
        """Returns the folder of all files whose names match a pattern, downloading what lacks. Raises NetworkError."""
        from huggingface_hub import snapshot_download

        patterns = list(patterns)
        folder = self._got(
            "a file", lambda: snapshot_download(self.repo, revision=self.revision, allow_patterns=patterns)
        )
        if folder is None:
            raise self.offline_error("model")
        return folder

    def _got(self, name: str, download: Callable[[], str]) -> Path | None:
        from huggingface_hub import errors

        try:
            with stopping.breaking_off():
                return Path(download())
        except errors.LocalEntryNotFoundError as error:
            self.unreachable = _first_line(error.__cause__ or error)
            return None
        except errors.EntryNotFoundError:
            return None
        except errors.GatedRepoError as error:
            raise NetworkError(self._gated()) from error
        except errors.RepositoryNotFoundError as error:
            raise NetworkError(
                f"{self.repo}: the hub has no such repository, or it is private: check the name, or log in with "
                "`hf auth login`"
            ) from error
        except errors.RevisionNotFoundError as error:
            raise NetworkError(f"{self.repo}: the hub has no revision {self.revision!r} of it") from error
        except errors.HFValidationError as error:
            raise InputError(f"{self.repo}: not a hub id ({_first_line(error)})") from error
        except errors.HfHubHTTPError as error:
            status = error.response.status_code
            answer = f"{self.repo}: the hub answered {status} for {name}: try later"
            raise NetworkError(self._gated() if status in (401, 403) else answer) from error
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
                raise storage_error(error, Path(error.filename or "the local hub cache")) from error
            raise NetworkError(f"{self.repo}: {name} could not be fetched ({_first_line(error)})") from error

    def offline_error(self, what: str) -> NetworkError:
        """Returns the error for a component that is not in the cache while the hub cannot be reached."""
        return NetworkError(
            f"{self.repo}: its {what} is not in the local hub cache and the hub cannot be reached "
            f"({self.unreachable}): go online, or pass a local file or folder"
        )

    def _gated(self) -> str:
        return (
            f"{self.repo} is gated: accept its licence at https://huggingface.co/{self.repo}, then log in with "
            "`hf auth login` or set HF_TOKEN"
        )


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
