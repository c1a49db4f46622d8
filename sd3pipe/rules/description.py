"""What people want to say of their adapter in its file."""

from dataclasses import asdict, dataclass

from sd3pipe.rules.declaring import rule

# fmt: off


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """The words of modelspec that only a person knows; a file made from another one keeps those that are not given."""

    metadata_title: str | None = rule(None, "Title in the adapter's metadata.", advanced=True)
    metadata_author: str | None = rule(None, "Author in the adapter's metadata.", advanced=True)
    metadata_description: str | None = rule(None, "Description in the adapter's metadata.", advanced=True)
    metadata_license: str | None = rule(None, "Licence in the adapter's metadata.", advanced=True)
    metadata_tags: str | None = rule(None, "Tags in the adapter's metadata, separated by commas.", advanced=True)
    metadata_trigger_phrase: str | None = rule(None, "Trigger phrase in the adapter's metadata.", advanced=True)
    metadata_usage_hint: str | None = rule(None, "Usage hint in the adapter's metadata.", advanced=True)

    def keys(self) -> dict[str, str]:
        """Returns the modelspec keys of the words that are given."""
        return {name.replace("metadata_", "modelspec.", 1): value for name, value in asdict(self).items() if value}
