"""Training recipes behind the `pynn` command; they need `pip install "pynn-torch[train]"`."""
