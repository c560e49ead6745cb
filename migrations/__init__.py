"""The stores' schemas as numbered SQL files."""
