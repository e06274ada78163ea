"""One file a run: what `--config=NAME` takes. In an installed package they are eim_jax.configs."""
