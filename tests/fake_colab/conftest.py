"""Nothing in this folder is collected: it is put on ``sys.path`` by the tests that need it."""

collect_ignore_glob = ["*"]
