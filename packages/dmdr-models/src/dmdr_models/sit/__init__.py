"""SiT: class-conditional flow matching with a transformer over latent patches."""
