//! The progress bar of `lazuli pull`: bytes that arrive, how fast, and how long it will take.
//!
//! What counts is what has to be transferred. All layers are counted until it shows what becomes of them: one that is lazy, or there
//! already, is left out as soon as it is taken, since nobody waits for its bytes; one that is streamed counts what has arrived at the daemon,
//! one that containerd unpacks what this command has downloaded for it.

use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use indicatif::{HumanDuration, ProgressBar, ProgressState, ProgressStyle};

use crate::catalog::status::LoadingStatus;
use crate::registry::image::LayerDescriptor;

const TEMPLATE: &str = "{spinner} {binary_bytes}/{binary_total_bytes} {wide_bar} {binary_bytes_per_sec}{left}  {msg}";

/// How far a pull is.
pub(super) struct Progress {
    bar: ProgressBar,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    layers: Vec<LayerState>,
    /// What is said of the daemon, if it cannot be asked.
    trouble: String,
}

#[derive(Debug)]
struct LayerState {
    digest: String,
    size: u64,
    received: u64,
    stage: Stage,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// It is not there yet.
    Open,
    /// It is there, and its bytes have come.
    Fetched,
    /// It is there, and nobody waited for its bytes.
    LeftOut,
}

impl Progress {
    /// A bar on standard error, if that is a terminal and `quiet` does not forbid it.
    pub(super) fn new(quiet: bool, layers: &[LayerDescriptor]) -> Self {
        let layers = layers.iter().map(|layer| LayerState {
            digest: layer.digest.to_string(),
            size: layer.size,
            received: 0,
            stage: Stage::Open,
        });
        let state = State {
            layers: layers.collect(),
            trouble: String::new(),
        };
        let bar = match quiet {
            true => ProgressBar::hidden(),
            false => ProgressBar::new(0),
        };
        // The template is a constant that the tests draw once.
        let style = ProgressStyle::with_template(TEMPLATE).unwrap_or_else(|_| ProgressStyle::default_bar());
        let progress = Progress {
            bar: bar.with_style(style.with_key("left", time_left)),
            state: Mutex::new(state),
        };
        progress.draw(&progress.lock());
        progress
    }

    /// Whether nobody sees it.
    pub(super) fn is_hidden(&self) -> bool {
        self.bar.is_hidden()
    }

    /// Shows what the daemon tells of its streams.
    pub(super) fn streams(&self, loading: &[LoadingStatus]) {
        self.change(|state| {
            state.trouble.clear();
            state.streams(loading);
        });
    }

    /// Shows that the daemon cannot be asked.
    pub(super) fn cannot_ask(&self) {
        self.change(|state| state.trouble = "; the daemon cannot be asked how far it is".to_owned());
    }

    /// Bytes of a layer have arrived here, all in all; 0 when its download begins.
    pub(super) fn downloaded(&self, layer: usize, received: u64) {
        self.change(|state| {
            if let Some(layer) = state.layers.get_mut(layer) {
                layer.received = received;
            }
        });
    }

    /// A layer is there.
    pub(super) fn done(&self, layer: usize) {
        self.change(|state| state.done(layer));
    }

    /// Takes the bar away.
    pub(super) fn finish(&self) {
        self.bar.finish_and_clear();
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.lock();
        change(&mut state);
        self.draw(&state);
    }

    fn draw(&self, state: &State) {
        let (received, all) = state.bytes();
        self.bar.set_length(all);
        self.bar.set_position(received);
        self.bar.set_message(state.message());
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn streams(&mut self, loading: &[LoadingStatus]) {
        for layer in self.layers.iter_mut().filter(|layer| layer.stage == Stage::Open) {
            // One that is no longer among the streams has come, or is asked for in another way: its bytes stay counted until that shows.
            if let Some(stream) = loading.iter().find(|stream| stream.digest == layer.digest) {
                layer.received = stream.received_bytes.min(layer.size);
            }
        }
    }

    fn done(&mut self, layer: usize) {
        if let Some(layer) = self.layers.get_mut(layer) {
            layer.stage = match layer.received {
                0 => Stage::LeftOut,
                _ => Stage::Fetched,
            };
        }
    }

    /// Bytes that have arrived, and bytes in all.
    fn bytes(&self) -> (u64, u64) {
        let counted = self.layers.iter().filter(|layer| layer.stage != Stage::LeftOut);
        counted.fold((0, 0), |(received, all), layer| {
            let here = match layer.stage {
                Stage::Fetched => layer.size,
                _ => layer.received,
            };
            (received + here, all + layer.size)
        })
    }

    fn message(&self) -> String {
        let done = self.layers.iter().filter(|layer| layer.stage != Stage::Open).count();
        format!("{done} of {} layers{}", self.layers.len(), self.trouble)
    }
}

/// Writes how long the rest will take at the present rate, if that can be told.
fn time_left(state: &ProgressState, out: &mut dyn fmt::Write) {
    let rest = state.len().unwrap_or_default().saturating_sub(state.pos());
    let seconds = rest as f64 / state.per_sec();
    if let Ok(left) = Duration::try_from_secs_f64(seconds.ceil())
        && rest > 0
    {
        // A bar that cannot be drawn is nobody's trouble.
        let _ = write!(out, ", {} left", HumanDuration(left));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(sizes: &[(&str, u64)]) -> State {
        let layers = sizes.iter().map(|(digest, size)| LayerState {
            digest: (*digest).to_owned(),
            size: *size,
            received: 0,
            stage: Stage::Open,
        });
        State {
            layers: layers.collect(),
            trouble: String::new(),
        }
    }

    fn stream(digest: &str, received_bytes: u64) -> LoadingStatus {
        LoadingStatus {
            digest: digest.to_owned(),
            blob_bytes: 0,
            received_bytes,
        }
    }

    #[test]
    fn it_counts_bytes_that_somebody_waits_for() {
        let mut state = state(&[("lazy", 1000), ("streamed", 100), ("unpacked", 10)]);
        assert_eq!(state.bytes(), (0, 1110));
        state.done(0);
        assert_eq!(state.bytes(), (0, 110), "a lazy layer is not waited for");
        state.streams(&[stream("streamed", 40), stream("of another pull", 7)]);
        assert_eq!(state.bytes(), (40, 110));
        state.streams(&[]);
        assert_eq!(state.bytes(), (40, 110), "it has ended, and nothing is lost");
        state.done(1);
        assert_eq!(state.bytes(), (100, 110));
        state.layers[2].received = 3;
        assert_eq!((state.bytes(), state.message().as_str()), ((103, 110), "2 of 3 layers"));
    }

    #[test]
    fn the_bar_can_be_drawn() {
        assert!(ProgressStyle::with_template(TEMPLATE).is_ok());
    }
}
