"""The page in Gradio 6: Live, Generate, Compare, Batch, About this machine."""

from fastdiff_app.live.page.blocks import mount

__all__ = ["mount"]
