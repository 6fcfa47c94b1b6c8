"""A detector behind HTTP: the API, the batcher behind it, a page to try it on. Needs the extra `serve`."""

from fastrcnn.serve.app import create_app, serve
from fastrcnn.serve.batcher import Batcher

__all__ = ["Batcher", "create_app", "serve"]
