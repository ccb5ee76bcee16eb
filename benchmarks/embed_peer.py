"""clip-retrieval's inference over shards, for benchmarks/embed.py, in an environment of its own.

    PEER/bin/python benchmarks/embed_peer.py CONFIG.json SHARDS OUT

All of it is clip-retrieval's but the loader of models, which wants the network: in its place open_clip builds the model
of CONFIG.json, with random weights.
"""

import os
import sys

sys.path.pop(0)  # this folder: another file here has the name of a package
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import open_clip  # noqa: E402
import torch  # noqa: E402
from clip_retrieval import clip_inference  # noqa: E402

if __name__ == "__main__":
    config, shards, out = sys.argv[1:]
    torch.set_num_threads(1)
    open_clip.add_model_config(config)
    name = os.path.splitext(os.path.basename(config))[0]

    def load(*_, **__):
        model, _, preprocess = open_clip.create_model_and_transforms(name)
        return model.eval(), preprocess, open_clip.get_tokenizer(name)

    for part in ("mapper", "worker", "main"):
        module = sys.modules[f"clip_retrieval.clip_inference.{part}"]
        if hasattr(module, "load_clip"):
            module.load_clip = load
    clip_inference(
        input_dataset=shards,
        output_folder=out,
        input_format="webdataset",
        batch_size=256,
        num_prepro_workers=1,
        enable_text=True,
        enable_image=True,
        enable_metadata=False,
        wds_image_key="jpg",
        wds_caption_key="txt",
        write_batch_size=100_000,
        enable_wandb=False,
        clip_model="ViT-B/32",
        use_jit=False,
        output_partition_count=1,
    )
