"""Runs inside a peer's own environment: loads a saved pipeline, answers requests for batches of pictures, one a line.

Knows nothing of fastdiff. A request is JSON: {"prompts", "seeds", "steps", "guidance", "settings"}; the answer is
{"ms", "file"}, or {"error"} with what the peer said. `settings` are the peer's, null runs the plain pipeline.
"""

import json
import os
import sys
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from diffusers import DiffusionPipeline


def _deepcache(pipe, settings):
    from DeepCache import DeepCacheSDHelper

    helper = DeepCacheSDHelper(pipe=pipe)
    helper.set_params(**settings)
    helper.enable()
    return helper.disable


def _cache_dit(pipe, settings):
    import cache_dit

    cache_dit.enable_cache(pipe, cache_config=cache_dit.DBCacheConfig(**settings))
    return lambda: cache_dit.disable_cache(pipe)


def main():
    folder, peer = Path(sys.argv[1]), sys.argv[2]
    enable = {"deepcache": _deepcache, "cache-dit": _cache_dit}[peer]
    torch.set_num_threads(int(sys.argv[3]))
    # whatever the libraries print must not end up between the answers
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    pipe = DiffusionPipeline.from_pretrained(folder / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    answers.write("{}\n")
    answers.flush()
    for number, line in enumerate(sys.stdin):
        asked = json.loads(line)
        try:
            disable = enable(pipe, asked["settings"]) if asked["settings"] is not None else lambda: None
            noise = [torch.Generator().manual_seed(seed) for seed in asked["seeds"]]
            start = perf_counter()
            images = pipe(
                asked["prompts"],
                num_inference_steps=asked["steps"],
                guidance_scale=asked["guidance"],
                generator=noise,
                output_type="np",
            ).images
            taken = (perf_counter() - start) * 1000
            disable()
            file = folder / f"{number}.npy"
            np.save(file, images.astype(np.float32))
            answer = {"ms": taken, "file": str(file)}
        except Exception as error:  # the peer's own words are the result
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
