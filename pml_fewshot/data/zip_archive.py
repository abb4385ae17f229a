"""Opening a zip of images, with one clear error when it is broken."""

import zipfile
from pathlib import Path


def open_zip(place: Path) -> zipfile.ZipFile:
    """Opens a zip for reading; nothing is ever unpacked to disk.

    Raises:
        ValueError: the file is no whole zip.
    """
    try:
        return zipfile.ZipFile(place)
    except zipfile.BadZipFile as error:
        raise broken_zip(place, str(error)) from error


def broken_zip(place: Path, what: str) -> ValueError:
    """The error to raise for a zip that turns out broken, also later than at its opening."""
    return ValueError(f"expected a whole zip file at {place}, got a broken one ({what}); delete it and fetch it again")
