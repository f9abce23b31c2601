"""Engines that generate text, behind one interface."""
