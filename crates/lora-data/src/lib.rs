//! Image and caption folders as Stable Diffusion trainers keep them.
