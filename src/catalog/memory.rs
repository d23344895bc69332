//! Memory for what is downloaded as a whole and then read: tables of contents, zTOCs, portable indexes. It comes out of the daemon's one
//! budget ([`Budget`]).
//!
//! How much reading takes is known when the bytes are there: their headers say what they unpack to, and the parsers keep to it. So a share for
//! the bytes alone is taken first, and a registry that does not deliver holds no more than that. Then it grows, if there is room. If there
//! is none, everything is given up, all of it is waited for with empty hands, and the bytes are downloaded again: nobody who holds a share
//! waits for another. What the finished index does not need is given back, and the rest when the index is in the cache.

use std::sync::Arc;

use bytes::Bytes;

use crate::sync::{Budget, Share};

/// Downloads `len` bytes with `fetch`, and has the memory that reading them takes besides, which `need` tells from them.
///
/// # Errors
/// Those of `fetch` and `need`.
pub(super) async fn download<E, F: Future<Output = Result<Bytes, E>>>(
    memory: &Arc<Budget>,
    len: u64,
    fetch: impl Fn() -> F,
    need: impl Fn(&[u8]) -> Result<u64, E>,
) -> Result<(Bytes, Share), E> {
    let mut share = memory.take(len).await;
    let bytes = fetch().await?;
    let whole = (bytes.len() as u64).saturating_add(need(&bytes)?);
    if share.grow(whole) {
        return Ok((bytes, share));
    }
    drop((bytes, share));
    let share = memory.take(whole).await;
    // The same bytes as before: they have a digest.
    Ok((fetch().await?, share))
}

/// Reads downloaded bytes on a thread where that may take its time. `read` gets them, and how much memory it may take besides; its result is
/// as large as it says. `None`: it panicked.
///
/// # Errors
/// Those of `read`.
pub(super) async fn read<T: Send + 'static, E: Send + 'static>(
    bytes: Bytes,
    mut share: Share,
    read: impl FnOnce(&[u8], u64) -> Result<(T, u64), E> + Send + 'static,
) -> Option<Result<(T, Share), E>> {
    // The share goes along: the thread goes on if nobody waits for it any more.
    let reading = move || {
        let beside = share.bytes().saturating_sub(bytes.len() as u64);
        let (result, size) = read(&bytes, beside)?;
        drop(bytes);
        share.shrink(size);
        Ok((result, share))
    };
    tokio::task::spawn_blocking(reading).await.ok()
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use futures::FutureExt as _;

    use super::*;

    const MIB: u64 = 1 << 20;

    #[tokio::test]
    async fn what_is_there_is_grown_and_given_back() {
        let memory = Budget::new(10 * MIB);
        let fetch = || async { Ok::<_, ()>(Bytes::from(vec![1; MIB as usize])) };
        let (bytes, share) = download(&memory, MIB, fetch, |_| Ok(4 * MIB)).await.unwrap();
        assert_eq!((bytes.len() as u64, memory.held()), (MIB, 5 * MIB));
        let read = read(bytes, share, |bytes, beside| {
            Ok::<_, ()>((bytes.len() as u64 + beside, MIB / 2))
        });
        let (seen, share) = read.await.unwrap().unwrap();
        assert_eq!((seen, memory.held()), (5 * MIB, MIB / 2));
        drop(share);
        assert_eq!(memory.held(), 0);
    }

    #[tokio::test]
    async fn without_room_it_begins_again_and_holds_nothing_while_it_waits() {
        let memory = Budget::new(10 * MIB);
        let other = memory.take(7 * MIB).await;
        let times = AtomicUsize::new(0);
        let fetch = || async {
            times.fetch_add(1, Ordering::Relaxed);
            Ok::<_, ()>(Bytes::from(vec![1; MIB as usize]))
        };
        let mut waits = download(&memory, MIB, fetch, |_| Ok(4 * MIB)).boxed();
        assert!(futures::poll!(&mut waits).is_pending());
        assert_eq!((times.load(Ordering::Relaxed), memory.held()), (1, 7 * MIB));
        drop(other);
        let (_, share) = waits.await.unwrap();
        assert_eq!((times.load(Ordering::Relaxed), share.bytes()), (2, 5 * MIB));
    }

    #[tokio::test]
    async fn two_that_need_all_do_not_wait_for_each_other() {
        let memory = Budget::new(10 * MIB);
        let one = || async {
            let fetch = || async {
                tokio::task::yield_now().await;
                Ok::<_, ()>(Bytes::from(vec![1; 4 * MIB as usize]))
            };
            download(&memory, 4 * MIB, fetch, |_| Ok(100 * MIB)).await.map(drop)
        };
        assert_eq!(futures::join!(one(), one(), one()), (Ok(()), Ok(()), Ok(())));
    }
}
