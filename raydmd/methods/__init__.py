"""Methods as compositions of a rollout, score terms and a fake-score loss, and the papers' presets."""
