"""Growth inside other people's training loops. Each module imports what it is for, and nothing here does.

hf: transformers' Trainer · lightning: Lightning's Trainer · averaging: EMA and SWA copies · tensorboard: a writer's
scalars and histograms.
"""
