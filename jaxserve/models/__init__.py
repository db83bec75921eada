"""Model families: how a config.json becomes a `ModelConfig`, and where its weights are named.

    family = family_for(json.loads(Path(DIR, "config.json").read_text()))
    config = family.config(hf)                        # strict: every field is accounted for
    sources = family.sources(config)
    sources["layers.0.attention.q"]                   # tensor, its shape, how to take q from it
    named_config("llama-2-7b")                        # a published size, nothing downloaded

A family is a module with a `FAMILY`, listed in `family.MODULES`. It adds no mathematics: that is
an enum in `jaxserve.config` and a place in `jaxserve.layers`.
"""
