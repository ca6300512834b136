"""Programs compiled for chips that are not here: what they hold, send and take (`experiments.aot_compile`)."""
