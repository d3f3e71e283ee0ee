"""The folder of a run's checkpoints, wherever it is."""

from data.urls import Location, Url
from train.checkpoints.folder import CheckpointFolder
from train.checkpoints.local_folder import LocalFolder
from train.checkpoints.url_folder import UrlFolder


def folder_at(location: Location) -> CheckpointFolder:
    """Return the folder at a path or a URL."""
    return UrlFolder(location) if isinstance(location, Url) else LocalFolder(location)
