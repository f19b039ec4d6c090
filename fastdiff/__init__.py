"""fastdiff: fast diffusers pipelines, live where wanted, with the price in quality measured."""

__version__ = "0.1.0"
