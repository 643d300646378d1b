"""The trainer: cached latents in, a trained video transformer out; never imports Ray or a video decoder.

`loop` tells the story. All modules, by what they are about:

    data        catalog mixture visit reader shards remote cache
    plan        curriculum order packing plan stage_plan stage_filter stage_windows stage_tokens frame_weights
                held_out loader
    model       architecture model_folder inputs weights layout collate positions model dit modulation lora
                long_context attention routes probe
    step        batch feed objective losses optim parallel sharding sequence flops
    run         loop stage_check stage_model step_log metrics board checkpoint saver resume lineage stopping
    evaluation  look validate sample export check
"""
