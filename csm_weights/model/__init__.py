"""Run CSM: load verified weights to a device, generate frames and speech, smoke-test a model.

Promises: every tensor of the network is loaded and no other; bytes are hashed
while they load where digests are given; the fast decoder gives the frames of
the readable reference. Never: runs a pickle, asks a server, writes weights.
Only this room imports torch.

    from csm_weights.model.csm import Model
    from csm_weights.model.generator import Generator

    model = Model.from_local("models/csm-1b", device="cpu")
    tokens = [1, 2, 3]  # or a text, where the model's folder has its tokenizer.json
    codes = Generator(model).generate_frames(tokens, 0, context=[], max_audio_length_ms=240)
"""
