//! The daemon's HTTP face: `/metrics`, `/healthz`, `/readyz` and `/status`.
