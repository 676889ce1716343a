"""Decoding on a CPU by compiled blocks: the fast backend of ``megamtp.inference.decoder``."""
