"""The perturbed pass resumes where it leaves the main pass, for ComfyUI's samplers.

``step`` holds the life of a step, ``unet`` and ``dit`` what is kept and handed out in each kind of
denoiser, ``control`` the residuals of ControlNets, ``inputs`` what two passes are compared by, and
``others`` what other nodes have put on the model.
"""
