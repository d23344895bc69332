//! From AlreadyExists to the snapshot: which one containerd finds.
//!
//! The answer to a Prepare that names a chain id has no place for a name. containerd lists the snapshots with that chain id and that parent
//! next, and takes the first. There may be several, if images with the same layers do not believe the same of them; so it is remembered which
//! one the last Prepare was about, and a list with exactly those two conditions has that one alone. A Prepare with another answer to the same
//! question waits until the one before has been listed, or for [`PATIENCE`]: its client may be gone.

use std::num::NonZeroUsize;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use lru::LruCache;
use tokio::sync::Notify;
use tokio::time::Instant;

/// Longest wait for a list that follows a Prepare; containerd makes it at once.
const PATIENCE: Duration = Duration::from_secs(2);
/// Questions whose last answer is remembered, of a few hundred bytes each.
const REMEMBERED: NonZeroUsize = NonZeroUsize::new(4096).unwrap();

/// Parent (empty for none) and chain id.
type Question = (String, String);

/// The last answer to a question.
struct Answer {
    name: String,
    /// How many have got it and not listed it.
    pending: usize,
    /// When they are not waited for any more.
    until: Instant,
}

/// What Prepares have answered.
pub(super) struct Handover {
    answers: Mutex<LruCache<Question, Answer>>,
    listed: Notify,
    patience: Duration,
}

impl Default for Handover {
    fn default() -> Self {
        Handover::with_patience(PATIENCE)
    }
}

impl Handover {
    fn with_patience(patience: Duration) -> Self {
        Handover {
            answers: Mutex::new(LruCache::new(REMEMBERED)),
            listed: Notify::new(),
            patience,
        }
    }

    /// Has the next list about `chain_id` on `parent` find `name`. Waits for lists of other answers to the same question.
    pub async fn answer(&self, parent: &str, chain_id: &str, name: &str) {
        let question = (parent.to_owned(), chain_id.to_owned());
        loop {
            let listed = self.listed.notified();
            tokio::pin!(listed);
            // Whoever lists from here on wakes us up.
            listed.as_mut().enable();
            let until = match self.give(&question, name) {
                None => return,
                Some(until) => until,
            };
            // Late or listed, it is looked at again.
            let _ = tokio::time::timeout_at(until, listed).await;
        }
    }

    /// Gives the answer, or tells until when to wait.
    fn give(&self, question: &Question, name: &str) -> Option<Instant> {
        let now = Instant::now();
        let until = now + self.patience;
        let mut answers = self.answers();
        match answers.get_mut(question) {
            Some(answer) if answer.name == name => {
                answer.pending += 1;
                answer.until = until;
            }
            Some(answer) if answer.pending > 0 && answer.until > now => return Some(answer.until),
            _ => {
                let answer = Answer {
                    name: name.to_owned(),
                    pending: 1,
                    until,
                };
                answers.put(question.clone(), answer);
            }
        }
        None
    }

    /// The snapshot that a list about `chain_id` on `parent` is to find; `None` if nothing is remembered.
    pub fn take(&self, parent: &str, chain_id: &str) -> Option<String> {
        let question = (parent.to_owned(), chain_id.to_owned());
        let mut answers = self.answers();
        let answer = answers.get_mut(&question)?;
        answer.pending = answer.pending.saturating_sub(1);
        let name = answer.name.clone();
        drop(answers);
        self.listed.notify_waiters();
        Some(name)
    }

    fn answers(&self) -> MutexGuard<'_, LruCache<Question, Answer>> {
        self.answers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[tokio::test]
    async fn each_list_finds_what_its_prepare_was_about() {
        // It would wait for ever.
        let handover = Arc::new(Handover::with_patience(Duration::from_secs(3600)));
        assert_eq!(handover.take("p", "c"), None);
        handover.answer("p", "c", "one").await;
        // The same for another namespace, and another question.
        handover.answer("p", "c", "one").await;
        handover.answer("", "c", "other").await;
        let waiting = tokio::spawn({
            let handover = Arc::clone(&handover);
            async move { handover.answer("p", "c", "two").await }
        });
        tokio::task::yield_now().await;
        assert_eq!(handover.take("p", "c").as_deref(), Some("one"));
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished(), "one more has to list it");
        assert_eq!(handover.take("p", "c").as_deref(), Some("one"));
        waiting.await.unwrap();
        assert_eq!(handover.take("p", "c").as_deref(), Some("two"));
        assert_eq!(handover.take("p", "c").as_deref(), Some("two"), "a list may come again");
        assert_eq!(handover.take("", "c").as_deref(), Some("other"));
    }

    #[tokio::test]
    async fn a_client_that_is_gone_holds_nobody_up_for_ever() {
        let handover = Handover::with_patience(Duration::from_millis(1));
        handover.answer("", "c", "one").await;
        handover.answer("", "c", "two").await;
        assert_eq!(handover.take("", "c").as_deref(), Some("two"));
    }
}
