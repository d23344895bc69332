//! Whether a host says anything at all to what a load asks of it.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Instant;

use futures::FutureExt;
use futures::future::BoxFuture;

use super::pace::Hosts;
use crate::layer::Digest;
use crate::registry::{Blob, Body, Origin, RegistryError};

/// What a load has heard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Heard {
    /// It has not asked yet.
    NotAsked,
    /// It asked then, and has no answer.
    Asked(Instant),
    /// It was answered.
    Answered,
}

/// A blob that notes whether it is answered for.
pub(super) struct Contact {
    blob: Arc<dyn Blob>,
    host: String,
    hosts: Arc<Hosts>,
    heard: Mutex<Heard>,
}

impl Contact {
    /// The blob at `host`.
    pub(super) fn new(blob: Arc<dyn Blob>, host: String, hosts: Arc<Hosts>) -> Arc<Self> {
        Arc::new(Contact {
            blob,
            host,
            hosts,
            heard: Mutex::new(Heard::NotAsked),
        })
    }

    /// Since when an answer is waited for, if none has ever come.
    pub(super) fn silent_since(&self) -> Option<Instant> {
        match *self.heard.lock().unwrap_or_else(PoisonError::into_inner) {
            Heard::Asked(since) => Some(since),
            Heard::NotAsked | Heard::Answered => None,
        }
    }

    fn note(&self, change: impl FnOnce(Heard) -> Heard) {
        let mut heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        *heard = change(*heard);
    }
}

/// The contacts of all loads.
#[derive(Default)]
pub(super) struct Contacts(Mutex<HashMap<Digest, Vec<Weak<Contact>>>>);

/// Keeps a contact in the list.
pub(super) struct Noted<'a> {
    contacts: &'a Contacts,
    layer: Digest,
    contact: Weak<Contact>,
}

impl Contacts {
    /// Knows a contact for `layer` until the answer is dropped.
    pub(super) fn note(&self, layer: Digest, contact: &Arc<Contact>) -> Noted<'_> {
        let contact = Arc::downgrade(contact);
        self.lock().entry(layer).or_default().push(Weak::clone(&contact));
        Noted {
            contacts: self,
            layer,
            contact,
        }
    }

    /// Which host a load of `layer` asks, if there is one.
    pub(super) fn host(&self, layer: &Digest) -> Option<String> {
        let contacts = self.lock();
        let contact = contacts.get(layer)?.iter().find_map(Weak::upgrade)?;
        Some(contact.host.clone())
    }

    /// Since when all who were asked for `layer` are silent, if they are.
    pub(super) fn silent_since(&self, layer: &Digest) -> Option<Instant> {
        let contacts = self.lock();
        let of_layer = contacts.get(layer)?.iter().filter_map(Weak::upgrade);
        let silent: Option<Vec<Instant>> = of_layer.map(|contact| contact.silent_since()).collect();
        silent?.into_iter().max()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Digest, Vec<Weak<Contact>>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Noted<'_> {
    fn drop(&mut self) {
        let mut contacts = self.contacts.lock();
        if let Some(of_layer) = contacts.get_mut(&self.layer) {
            of_layer.retain(|contact| !contact.ptr_eq(&self.contact));
            if of_layer.is_empty() {
                contacts.remove(&self.layer);
            }
        }
    }
}

impl Contact {
    async fn hear(&self, read: BoxFuture<'_, Result<Body, RegistryError>>) -> Result<Body, RegistryError> {
        self.note(|heard| match heard {
            Heard::NotAsked => Heard::Asked(Instant::now()),
            heard => heard,
        });
        let body = read.await;
        // A refusal is an answer as well, unless it is that nobody was there.
        if !matches!(body, Err(RegistryError::Unreachable { .. })) {
            self.note(|_| Heard::Answered);
            self.hosts.answered(&self.host, Instant::now());
        }
        body
    }
}

impl Blob for Contact {
    fn read(&self, range: Range<u64>) -> BoxFuture<'_, Result<Body, RegistryError>> {
        self.hear(self.blob.read(range)).boxed()
    }

    fn read_part(&self, range: Range<u64>) -> BoxFuture<'_, Result<Body, RegistryError>> {
        self.hear(self.blob.read_part(range)).boxed()
    }

    fn read_beside(&self, range: Range<u64>) -> BoxFuture<'_, Result<Body, RegistryError>> {
        self.hear(self.blob.read_beside(range)).boxed()
    }

    fn size(&self) -> u64 {
        self.blob.size()
    }

    fn distrust(&self) {
        self.blob.distrust();
    }

    fn verified(&self) {
        self.blob.verified();
    }

    fn refusals(&self, host: &str) -> Option<u64> {
        self.blob.refusals(host)
    }

    fn describe(&self) -> String {
        self.blob.describe()
    }

    fn origin(&self) -> Origin {
        self.blob.origin()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Fails(RegistryError);

    impl Blob for Fails {
        fn read(&self, _: Range<u64>) -> BoxFuture<'_, Result<Body, RegistryError>> {
            let error = self.0.clone();
            async move { Err(error) }.boxed()
        }
        fn size(&self) -> u64 {
            1
        }
        fn origin(&self) -> Origin {
            Origin::default()
        }

        fn describe(&self) -> String {
            String::new()
        }
    }

    fn contact(error: RegistryError) -> Arc<Contact> {
        Contact::new(Arc::new(Fails(error)), "h".to_owned(), Arc::default())
    }

    #[tokio::test]
    async fn a_layer_is_silent_if_all_are_who_were_asked() {
        let (host, what) = ("h".to_owned(), "w".to_owned());
        let gone = contact(RegistryError::Unreachable {
            host: host.clone(),
            what: what.clone(),
        });
        let answers = contact(RegistryError::NotFound { host, what });
        let (contacts, layer) = (Contacts::default(), Digest::of(b"layer"));
        let noted = contacts.note(layer, &gone);
        assert_eq!(contacts.silent_since(&layer), None, "nobody was asked");
        let _ = gone.read(0..1).await;
        assert!(contacts.silent_since(&layer).is_some());
        let other = contacts.note(layer, &answers);
        let _ = answers.read(0..1).await;
        assert_eq!(contacts.silent_since(&layer), None);
        drop(other);
        assert!(contacts.silent_since(&layer).is_some());
        drop(noted);
        assert!(contacts.lock().is_empty());
    }
}
