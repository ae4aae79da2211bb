"""A stand-in for Colab's own package, with its failures.

Properties it gives, each as Google's package or its issue tracker describes them:

- ``drive``: the mount point must be free of spaces, empty and no link; off hosted Colab mounting is not implemented; a
  refused dialog and a crowded root folder are errors; what is mounted can be lost (error 107, or files that seem gone)
  until it is mounted again with force; reads may be short, Drive may be full.
- ``userdata``: a missing secret, a secret without notebook access and an answer that never comes are three exceptions
  that derive from ``Exception`` alone.
- ``files``, ``output``, ``runtime``: uploads by name, downloads of existing files only, the end of the session.

``google.colab.state`` holds what a test wants to happen.
"""

from google.colab import drive, files, output, runtime, userdata
from google.colab._state import state

__all__ = ["drive", "files", "output", "runtime", "state", "userdata"]
