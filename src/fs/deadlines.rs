//! After how long a read that waits for a registry is answered with an error.
//!
//! A registry that comes back after some minutes should fail nobody, so the configured time is long. What ends it earlier:
//!
//! - The kernel may abort the connection of *all* images for one late answer (`fs.fuse.max_request_timeout`).
//! - A process that waits in the tree face for an answer to a request of its own (a page without read-ahead, O_DIRECT) cannot be killed, and the
//!   kernel takes it for hung after `kernel.hung_task_timeout_secs`: it logs that, and panics where it is told to. In the image face,
//!   the kernel reads for a process that can be killed; [`waiting`](super::waiting) ends what is left of its read.

use std::time::Duration;

use super::faces::Face;

/// How much earlier than a limit of the kernel a read is answered, as a request may wait for a moment before it is read.
const BEFORE_KERNEL: Duration = Duration::from_secs(5);

/// After how long reads are answered at the latest, by whom.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Deadlines {
    /// A reader of the image face gets an error after this time.
    pub image: Duration,
    /// A reader of the tree face does.
    pub tree: Duration,
    /// The kernel aborts the connection after this time, if it does.
    pub kernel: Option<Duration>,
    /// The time that is configured.
    wanted: Duration,
}

impl Deadlines {
    /// The deadline `wanted`, but before that of the kernel, and in the tree before the time after which it looks for `hung` tasks.
    pub(super) fn new(wanted: Duration, kernel: Option<Duration>, hung: Option<Duration>) -> Self {
        let before = |time: Duration, limit: Option<Duration>| {
            limit.map_or(time, |limit| time.min(limit.saturating_sub(BEFORE_KERNEL)))
        };
        let image = before(wanted, kernel);
        Deadlines {
            image,
            tree: before(image, hung),
            kernel,
            wanted,
        }
    }

    /// That of a face.
    pub fn of(&self, face: Face) -> Duration {
        match face {
            Face::Image => self.image,
            Face::Tree => self.tree,
        }
    }

    /// Says in the log what has shortened the deadline of `face`, if anything has.
    pub(super) fn explain(&self, face: Face) {
        let seconds = self.of(face).as_secs();
        if self.image < self.wanted {
            tracing::warn!(
                seconds,
                "fetch.read_deadline is shortened: this kernel aborts FUSE connections for late answers (fs.fuse.max_request_timeout)"
            );
        } else if self.of(face) < self.wanted {
            tracing::info!(
                seconds,
                "fetch.read_deadline is shortened: the tree face's readers cannot be killed, and this kernel takes them for hung \
                 (kernel.hung_task_timeout_secs)"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_read_is_answered_before_the_kernel_gives_anything_up() {
        let seconds = Duration::from_secs;
        for (wanted, kernel, hung, image, tree) in [
            (900, None, None, 900, 900),
            (900, None, Some(120), 900, 115),
            (900, Some(300), Some(120), 295, 115),
            (900, Some(60), Some(120), 55, 55),
            (900, Some(15), None, 10, 10),
            (120, Some(120), Some(1200), 115, 115),
            (3, Some(15), Some(120), 3, 3),
        ] {
            let deadlines = Deadlines::new(seconds(wanted), kernel.map(seconds), hung.map(seconds));
            let of = |face| deadlines.of(face);
            let case = format!("{wanted} {kernel:?} {hung:?}");
            assert_eq!(
                (of(Face::Image), of(Face::Tree)),
                (seconds(image), seconds(tree)),
                "{case}"
            );
            assert!(kernel.is_none_or(|kernel| deadlines.image < seconds(kernel)));
            assert!(hung.is_none_or(|hung| deadlines.tree < seconds(hung)));
        }
    }
}
