"""The engines that are measured, each a program that bench.wire talks to."""
