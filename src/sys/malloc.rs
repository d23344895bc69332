//! The allocator. With glibc's, freed memory goes back to the kernel only under rules that suit programs other than a daemon.

/// Bytes from which on an allocation is pages of its own, which go back when it is freed: more than buffers have, which come again and again.
/// Left alone, glibc raises the number with each such allocation that is freed, up to 32 MiB, and what large indexes were in stays with the
/// process, as holes between small allocations.
#[cfg(target_env = "gnu")]
const OWN_PAGES: i32 = 2 << 20;
/// Free bytes at the end of an arena from which on they go back.
#[cfg(target_env = "gnu")]
const FREE_END: i32 = 2 << 20;
/// Most arenas, each of which keeps what was freed in it. glibc makes eight for each processor, and most of the daemon's threads wait.
#[cfg(target_env = "gnu")]
const ARENAS: i32 = 2;

/// Has freed memory go back to the kernel as far as that can be set. Called once, before there are other threads.
pub fn give_back_what_is_freed() {
    #[cfg(target_env = "gnu")]
    {
        // SAFETY: these only set numbers of the allocator. What it does not know, it refuses.
        unsafe {
            libc::mallopt(libc::M_MMAP_THRESHOLD, OWN_PAGES);
            libc::mallopt(libc::M_TRIM_THRESHOLD, FREE_END);
            libc::mallopt(libc::M_ARENA_MAX, ARENAS);
        }
    }
}

/// Gives freed memory back to the kernel now; takes milliseconds, in which others may wait for the allocator.
pub fn trim() {
    #[cfg(target_env = "gnu")]
    {
        // SAFETY: it touches only what is free.
        unsafe {
            libc::malloc_trim(0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Says to a test process that it is the child of another.
    const CHILD: &str = "LAZULI_TEST_ALLOCATOR";
    const LARGE: usize = 8 << 20;

    fn resident() -> usize {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<usize>().unwrap() << 10
    }

    /// In a process of its own: others allocate what they like.
    #[cfg(target_env = "gnu")]
    #[test]
    fn what_is_freed_goes_back_although_something_small_lies_behind_it() {
        if std::env::var_os(CHILD).is_none() {
            let name = "sys::malloc::tests::what_is_freed_goes_back_although_something_small_lies_behind_it";
            let mut command = std::process::Command::new(std::env::current_exe().unwrap());
            let child = command.args(["--exact", name]).env(CHILD, "1").output().unwrap();
            assert!(child.status.success(), "{}", String::from_utf8_lossy(&child.stdout));
            return;
        }
        give_back_what_is_freed();
        // The first would raise the threshold above all that come.
        drop(std::hint::black_box(vec![1_u8; 2 * LARGE]));
        let before = resident();
        let mut small = Vec::new();
        for _ in 0..4 {
            let large = std::hint::black_box(vec![1_u8; LARGE]);
            small.push(std::hint::black_box(vec![1_u8; 1000]));
            drop(large);
        }
        assert!(resident() < before + LARGE / 2, "{} and {before}", resident());
        // And of what is too small to have pages of its own.
        let mut pieces: Vec<_> = (0..2 * LARGE / 1000)
            .map(|_| std::hint::black_box(vec![1_u8; 1000]))
            .collect();
        let mut at = 0;
        pieces.retain(|_| {
            at += 1;
            at % 100 == 0
        });
        assert!(resident() > before + LARGE, "it lies between what stays");
        trim();
        assert!(resident() < before + LARGE / 2, "{} and {before}", resident());
        drop((small, pieces));
    }
}
