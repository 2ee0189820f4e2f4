"""Members of archives: which of them are images that are wanted."""

from vsc_serve.sources.folder import why_not_wanted
from vsc_serve.sources.names import Choice, Naming, why_junk


def is_wanted(name: str, naming: Naming, choice: Choice) -> bool:
    """Tell whether a member of an archive is given; report it where it is passed over.

    Args:
        name: Path inside the archive, with `/`.
        naming: How members are called.
        choice: What is left out.
    """
    path = naming.prefix + name
    why = why_junk(name) or why_not_wanted(name.rpartition("/")[2])
    if why is None and choice.excludes_any(path):
        why = "excluded"
    if why is not None:
        choice.skip(path, why)
    return why is None
