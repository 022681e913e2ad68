//! The global memory of one device.
//!
//! A device address is the host address of the same byte, in an address range reserved once and backed page by page as
//! it is touched. Pinned and managed memory therefore have one address on both sides. Allocations are at least
//! [`GUARD`] bytes apart, fresh memory is filled with 0xFF (NaN in every float format; zeros on request), and freed
//! ranges are quarantined before reuse, so that a late access hits no live allocation.
//!
//! A bitmap records which bytes have been written. Not here: streams and their ordering, which belong to the driver.
//!
//! # Concurrency
//! As on a GPU, the bytes belong to the emulated program. No Rust reference to them outlives a call, so a copy that
//! races with a kernel can garble the program's data, never the emulator's.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
#[cfg(target_os = "linux")]
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Bytes between allocations.
pub const GUARD: u64 = 512;
/// Alignment of allocations, in bytes.
pub const ALIGN: u64 = 512;
/// Freed bytes held back before the oldest are reused.
const QUARANTINE: u64 = 256 << 20;
/// Fill byte of fresh memory.
const POISON: u8 = 0xff;
/// Allocations of at least this size are poisoned by mapping a file over them, which costs only what is touched.
const LARGE: u64 = 32 << 20;
/// Size of that file.
const POISON_FILE: u64 = 8 << 20;
/// Upper bound on the page size of any supported machine.
const PAGE: u64 = 64 << 10;
/// Address hint for the first device's range, so that addresses repeat from run to run.
const FIRST_BASE: u64 = 0x6f00_0000_0000;

/// A live allocation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Allocation {
    /// First byte.
    pub address: u64,
    /// Size requested.
    pub bytes: u64,
    /// Number of the allocation, counted from 1.
    pub serial: u64,
    /// Pinned or managed: readable by the host, always initialised, not counted as used.
    pub host: bool,
}

/// Why an access from the host was refused. Displays as a sentence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryError {
    /// The CUresult: 1 (invalid value).
    pub code: u32,
    /// The sentence.
    pub message: String,
}

impl MemoryError {
    fn new(message: String) -> Self {
        MemoryError { code: 1, message }
    }
}

impl fmt::Display for MemoryError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for MemoryError {}

/// A range of address space from the operating system.
struct Range {
    base: u64,
    bytes: u64,
}

impl Range {
    fn reserve(hint: u64, bytes: u64) -> Option<Range> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new anonymous mapping. Without MAP_FIXED the hint cannot replace an existing one.
        let at = unsafe { libc::mmap(hint as *mut libc::c_void, bytes as usize, protection, flags, -1, 0) };
        (at != libc::MAP_FAILED).then_some(Range { base: at as u64, bytes })
    }

    /// Returns the pages to the operating system. On Linux they read as zero afterwards.
    fn clear(&self) {
        // SAFETY: the range is exactly this mapping, which is anonymous and private; no reference to its contents
        // exists.
        unsafe { libc::madvise(self.base as *mut libc::c_void, self.bytes as usize, libc::MADV_DONTNEED) };
    }
}

/// Anonymous files (memfd) exist on Linux only.
#[cfg(not(target_os = "linux"))]
fn poison_file() -> Option<libc::c_int> {
    None
}

/// A file of [`POISON_FILE`] poison bytes, or None if the operating system refuses one.
#[cfg(target_os = "linux")]
fn poison_file() -> Option<libc::c_int> {
    static FILE: OnceLock<Option<libc::c_int>> = OnceLock::new();
    *FILE.get_or_init(|| {
        // SAFETY: creates an anonymous file that stays open until the process ends; the write reads a live vector.
        unsafe {
            let file = libc::memfd_create(c"cuda_emu poison".as_ptr(), libc::MFD_CLOEXEC);
            let poison = vec![POISON; POISON_FILE as usize];
            let whole = file >= 0 && libc::write(file, poison.as_ptr().cast(), poison.len()) == poison.len() as isize;
            whole.then_some(file)
        }
    })
}

/// Fills fresh memory with poison or, if `zero`, with zeros. Large ranges are remapped, so that untouched pages cost
/// neither memory nor time.
///
/// # Safety
/// The range lies inside a private mapping of this crate, and no reference to its contents exists.
unsafe fn refill(at: u64, bytes: u64, zero: bool) {
    let (mut from, upto) = (at.next_multiple_of(PAGE), (at + bytes) / PAGE * PAGE);
    // A file that is mapped again and again, or pages of no file, which are zero.
    let file = match zero {
        _ if bytes < LARGE => None,
        true => Some((-1, libc::MAP_ANONYMOUS, u64::MAX)),
        false => poison_file().map(|file| (file, 0, POISON_FILE)),
    };
    let fill = if zero { 0 } else { POISON };
    let Some((file, anonymous, piece)) = file else {
        // SAFETY: the caller guarantees that the range is ours to write.
        return unsafe { std::ptr::write_bytes(at as *mut u8, fill, bytes as usize) };
    };
    // SAFETY: MAP_FIXED replaces only whole pages inside the caller's range, by private pages of the file or of none;
    // the partial pages at both ends are written.
    unsafe {
        std::ptr::write_bytes(at as *mut u8, fill, (from - at) as usize);
        std::ptr::write_bytes(upto as *mut u8, fill, (at + bytes - upto) as usize);
        while from < upto {
            let length = piece.min(upto - from);
            let protection = libc::PROT_READ | libc::PROT_WRITE;
            let flags = libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE | anonymous;
            let mapped = libc::mmap(from as *mut libc::c_void, length as usize, protection, flags, file, 0);
            if mapped == libc::MAP_FAILED {
                std::ptr::write_bytes(from as *mut u8, fill, length as usize);
            }
            from += length;
        }
    }
}

impl Drop for Range {
    fn drop(&mut self) {
        // SAFETY: `reserve` made this mapping. Nothing keeps a pointer into it longer than the `Range`'s owner lives.
        unsafe { libc::munmap(self.base as *mut libc::c_void, self.bytes as usize) };
    }
}

struct Table {
    live: BTreeMap<u64, Allocation>,
    /// Free ranges: address to size.
    free: BTreeMap<u64, u64>,
    /// Freed allocations in quarantine with their size including the guard, oldest first.
    resting: VecDeque<(Allocation, u64)>,
    resting_bytes: u64,
    used: u64,
    serial: u64,
    snapshot: Option<Arc<Vec<Allocation>>>,
}

/// One device's global memory. Every method may be called from several threads at once.
pub struct Memory {
    range: Range,
    /// One bit per byte of `range`: has it been written?
    written: Range,
    /// Last accesses to each 4-byte word, allocated by the first launch that checks for races between blocks.
    shadow: Mutex<Option<Arc<Shadow>>>,
    limit: u64,
    /// Fresh memory is zero instead of poison.
    zero: bool,
    table: Mutex<Table>,
    untracked: AtomicBool,
}

/// The last writer and reader of every 4-byte word, for the detection of races between blocks (see [`crate::exec`]).
/// Words may be read or written only while [`hold`](Shadow::hold) is held for their address.
pub struct Shadow {
    /// One u64 per 4 bytes of device memory for the writer, followed by as many for the reader.
    range: Range,
    /// A [`Sector`] per [`SECTOR`] bytes of device memory.
    sectors: Range,
    of: u64,
    generation: AtomicU64,
    locks: Box<[Lock; LOCKS]>,
}

/// Consecutive bytes of device memory that a [`Sector`] describes.
pub const SECTOR: u64 = 64;

/// The writer's and the reader's entry of all words of a sector, as long as they have the same. Atomic only because
/// they may be read without the lock.
pub struct Sector {
    /// Entry of the last writer.
    pub writer: AtomicU64,
    /// Entry of the last reader.
    pub reader: AtomicU64,
}

/// Consecutive bytes of device memory covered by one lock of a [`Shadow`].
pub const HELD: u64 = 512;
/// Number of locks; lock i covers every `LOCKS`th stretch of [`HELD`] bytes.
const LOCKS: usize = 512;

/// A lock on its own cache line.
#[repr(align(64))]
struct Lock(AtomicBool);

/// Guard of a [`Shadow`] lock.
pub struct Held<'a>(&'a AtomicBool);

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

impl Shadow {
    /// Locks the stretch of [`HELD`] bytes that contains an address. Never hold two. A spin lock: it is held for a few
    /// dozen instructions, which `std::sync::Mutex` would double.
    #[inline(always)]
    pub fn hold(&self, address: u64) -> Held<'_> {
        let lock = &self.locks[(address / HELD) as usize % LOCKS].0;
        let mut tries = 0u32;
        while lock.swap(true, Ordering::Acquire) {
            tries += 1;
            match tries % 64 {
                0 => std::thread::yield_now(),
                _ => std::hint::spin_loop(),
            }
        }
        Held(lock)
    }

    /// Pointers to the (writer, reader) entries of the 4-byte word that contains an address. Entries of the following
    /// words follow.
    ///
    /// # Safety
    /// The address lies in the device's range. The entries are accessed only under [`hold`](Shadow::hold).
    pub unsafe fn word(&self, address: u64) -> (*mut u64, *mut u64) {
        let at = (self.range.base + (address - self.of) / 4 * 8) as *mut u64;
        // SAFETY: with the address in range both pointers stay inside the mapping, which is page-aligned, zeroed by the
        // operating system, and lives as long as self.
        (at, unsafe { at.byte_add(self.range.bytes as usize / 2) })
    }

    /// The sector that contains an address.
    ///
    /// # Safety
    /// The address lies in the device's range. The sector is written only under [`hold`](Shadow::hold).
    #[inline(always)]
    pub unsafe fn sector(&self, address: u64) -> &Sector {
        let index = (address - self.of) / SECTOR;
        // SAFETY: with the address in range the sector is inside the mapping, which is page-aligned, zeroed by the
        // operating system, and lives as long as self.
        unsafe { &*((self.sectors.base + index * size_of::<Sector>() as u64) as *const Sector) }
    }

    /// A generation from 1 to 4095 that no entry holds yet.
    pub fn next_generation(&self) -> u64 {
        let generation = self.generation.fetch_add(1, Ordering::Relaxed) % 4096;
        if generation == 0 {
            self.range.clear();
            self.sectors.clear();
            return self.next_generation();
        }
        generation
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Memory {
    /// Creates a device memory of which at most `limit` bytes can be allocated at a time.
    ///
    /// # Panics
    /// If the operating system has no address space left.
    pub fn new(limit: u64) -> Self {
        Memory::filled(limit, false)
    }

    /// The same, whose fresh memory is zero if `zero`: for launches that leave most of their results undone.
    ///
    /// # Panics
    /// As [`Memory::new`].
    pub fn filled(limit: u64, zero: bool) -> Self {
        let wanted = (2 * limit + (2 << 30)).next_multiple_of(1 << 21);
        // Smaller where address space is limited: fragmentation then shows earlier, nothing else changes.
        let range = [wanted, wanted / 2, wanted / 4, 1 << 30]
            .into_iter()
            .find_map(|bytes| Range::reserve(FIRST_BASE, bytes))
            .unwrap_or_else(|| panic!("no address space for {wanted} bytes of device memory"));
        let written = Range::reserve(0, range.bytes / 8)
            .unwrap_or_else(|| panic!("no address space for {} bytes", range.bytes / 8));
        let free = BTreeMap::from([(range.base.next_multiple_of(ALIGN) + ALIGN, range.bytes - 2 * ALIGN)]);
        let table = Table {
            live: BTreeMap::new(),
            free,
            resting: VecDeque::new(),
            resting_bytes: 0,
            used: 0,
            serial: 0,
            snapshot: None,
        };
        Memory {
            range,
            written,
            shadow: Mutex::new(None),
            limit,
            zero,
            table: Mutex::new(table),
            untracked: AtomicBool::new(false),
        }
    }

    /// Allocates device memory, poisoned and marked as unwritten, aligned to [`ALIGN`]. None if the limit would be
    /// exceeded or `bytes` is 0.
    pub fn alloc(&self, bytes: u64) -> Option<u64> {
        self.allocate(bytes, false)
    }

    /// Allocates memory that the host may also access (pinned, managed): zeroed, marked as written, not counted against
    /// the limit.
    pub fn alloc_host(&self, bytes: u64) -> Option<u64> {
        self.allocate(bytes, true)
    }

    fn allocate(&self, bytes: u64, host: bool) -> Option<u64> {
        let mut table = lock(&self.table);
        if bytes == 0 || bytes > self.range.bytes || (!host && bytes > self.limit.saturating_sub(table.used)) {
            return None;
        }
        let span = bytes.next_multiple_of(ALIGN) + GUARD;
        let address = loop {
            let fit = table.free.iter().find(|&(_, &free)| free >= span).map(|(&at, &free)| (at, free));
            if let Some((at, free)) = fit {
                table.free.remove(&at);
                if free > span {
                    table.free.insert(at + span, free - span);
                }
                break at;
            }
            let (oldest, rested) = table.resting.pop_front()?;
            table.resting_bytes -= rested;
            table.release(oldest.address, rested);
        };
        table.serial += 1;
        let serial = table.serial;
        table.live.insert(address, Allocation { address, bytes, serial, host });
        if !host {
            table.used += bytes;
        }
        table.snapshot = None;
        // SAFETY: [address, address + bytes) was on the free list until now and lies inside the mapping; no launch
        // under way knows it as an allocation.
        unsafe {
            match host {
                true => std::ptr::write_bytes(address as *mut u8, 0, bytes as usize),
                false => refill(address, bytes, self.zero),
            }
        }
        match host {
            true => self.mark(address, bytes, true),
            false => self.unmark(address, bytes),
        }
        Some(address)
    }

    /// Frees an allocation, given its first address.
    pub fn free(&self, at: u64) -> Result<(), MemoryError> {
        let mut table = lock(&self.table);
        let Some(allocation) = table.live.remove(&at) else {
            return Err(MemoryError::new(format!("address {at:#x} cannot be freed: {}", table.nearest(at))));
        };
        if !allocation.host {
            table.used -= allocation.bytes;
        }
        table.snapshot = None;
        if allocation.bytes >= LARGE {
            // SAFETY: the range was just removed from the table of live allocations and stays mapped. Poisoning it now,
            // not at reuse, returns its pages to the operating system.
            unsafe { refill(at, allocation.bytes, self.zero) };
        }
        let span = allocation.bytes.next_multiple_of(ALIGN) + GUARD;
        table.resting.push_back((allocation, span));
        table.resting_bytes += span;
        while table.resting_bytes > QUARANTINE
            && let Some((oldest, span)) = table.resting.pop_front()
        {
            table.resting_bytes -= span;
            table.release(oldest.address, span);
        }
        Ok(())
    }

    /// Fails unless the range is inside one live allocation, which the returned lock keeps alive.
    fn locate(&self, what: &str, at: u64, bytes: u64) -> Result<MutexGuard<'_, Table>, MemoryError> {
        let table = lock(&self.table);
        table.require(what, at, bytes)?;
        Ok(table)
    }

    /// Copies from the host; the range must lie in one allocation.
    pub fn copy_in(&self, to: u64, from: &[u8]) -> Result<(), MemoryError> {
        let _table = self.locate("the destination's", to, from.len() as u64)?;
        if !from.is_empty() {
            // SAFETY: the destination is inside a live allocation, which the lock keeps alive. `from` may be pinned
            // memory of this very device: `copy` allows overlap.
            unsafe { std::ptr::copy(from.as_ptr(), to as *mut u8, from.len()) };
            self.mark(to, from.len() as u64, true);
        }
        Ok(())
    }

    /// Copies to the host. Bytes that were never written read as poison.
    pub fn copy_out(&self, from: u64, to: &mut [u8]) -> Result<(), MemoryError> {
        let _table = self.locate("the source's", from, to.len() as u64)?;
        if !to.is_empty() {
            // SAFETY: the source is inside a live allocation, which the lock keeps alive; `copy` allows overlap.
            unsafe { std::ptr::copy(from as *const u8, to.as_mut_ptr(), to.len()) };
        }
        Ok(())
    }

    /// Copies within the device, including which bytes have been written.
    pub fn copy_within(&self, to: u64, from: u64, bytes: u64) -> Result<(), MemoryError> {
        let table = self.locate("the source's", from, bytes)?;
        table.require("the destination's", to, bytes)?;
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: both ranges are inside live allocations, which the lock keeps alive; `copy` allows overlap.
        unsafe { std::ptr::copy(from as *const u8, to as *mut u8, bytes as usize) };
        if self.written(from, bytes) {
            self.mark(to, bytes, true);
        } else {
            let known: Vec<bool> = (0..bytes).map(|i| self.written(from + i, 1)).collect();
            for (i, known) in known.into_iter().enumerate() {
                self.mark(to + i as u64, 1, known);
            }
        }
        Ok(())
    }

    /// Fills `count` elements with `pattern`, whose length is 1, 2 or 4.
    pub fn set(&self, to: u64, pattern: &[u8], count: u64) -> Result<(), MemoryError> {
        let bytes = count.saturating_mul(pattern.len() as u64);
        let _table = self.locate("the destination's", to, bytes)?;
        if bytes == 0 {
            return Ok(());
        }
        let target = to as *mut u8;
        // SAFETY: `bytes` bytes from `target` on are inside a live allocation, which the lock keeps alive. Raw writes,
        // not a slice: the emulated program may hold the address and read at the same time.
        unsafe {
            match *pattern {
                [byte] => target.write_bytes(byte, bytes as usize),
                [a, b] => (0..count as usize).for_each(|i| target.cast::<[u8; 2]>().add(i).write([a, b])),
                [a, b, c, d] => (0..count as usize).for_each(|i| target.cast::<[u8; 4]>().add(i).write([a, b, c, d])),
                _ => (0..bytes as usize).for_each(|i| target.add(i).write(pattern[i % pattern.len()])),
            }
        }
        self.mark(to, bytes, true);
        Ok(())
    }

    /// Makes an allocation fresh again, poisoned and unwritten: for graph memory, which every launch allocates anew.
    pub fn forget(&self, at: u64) -> Result<(), MemoryError> {
        let table = lock(&self.table);
        let Some(&Allocation { bytes, .. }) = table.live.get(&at) else {
            let message = format!("{at:#x} starts no allocation: {}", table.nearest(at));
            return Err(MemoryError::new(message));
        };
        // SAFETY: the range is a live allocation, which the lock keeps alive, inside this device's private mapping.
        unsafe { refill(at, bytes, self.zero) };
        self.unmark(at, bytes);
        Ok(())
    }

    /// Bytes in use by device allocations.
    pub fn used(&self) -> u64 {
        lock(&self.table).used
    }

    /// The limit.
    pub fn limit(&self) -> u64 {
        self.limit
    }

    /// Live allocations by address.
    pub fn live(&self) -> Vec<Allocation> {
        lock(&self.table).live.values().copied().collect()
    }

    /// The live allocation that contains an address.
    pub fn find(&self, address: u64) -> Option<Allocation> {
        lock(&self.table).find(address)
    }

    /// Whether an address is in this device's range, allocated or not.
    pub fn owns(&self, address: u64) -> bool {
        address.wrapping_sub(self.range.base) < self.range.bytes
    }

    /// Live allocations by address, shared. A launch works on the snapshot taken when it began.
    pub(crate) fn snapshot(&self) -> Arc<Vec<Allocation>> {
        let mut table = lock(&self.table);
        if let Some(snapshot) = &table.snapshot {
            return snapshot.clone();
        }
        let snapshot = Arc::new(table.live.values().copied().collect::<Vec<_>>());
        table.snapshot = Some(snapshot.clone());
        snapshot
    }

    /// Address and size of the device's range.
    pub(crate) fn range(&self) -> (u64, u64) {
        (self.range.base, self.range.bytes)
    }

    /// The shadow memory for races between blocks, or None if there is no address space for it.
    pub(crate) fn shadow(&self) -> Option<Arc<Shadow>> {
        let mut shadow = lock(&self.shadow);
        if shadow.is_none() {
            let range = Range::reserve(0, self.range.bytes * 4)?;
            let sectors = Range::reserve(0, self.range.bytes.div_ceil(SECTOR) * size_of::<Sector>() as u64)?;
            let locks = Box::new([const { Lock(AtomicBool::new(false)) }; LOCKS]);
            let (of, generation) = (self.range.base, AtomicU64::new(1));
            *shadow = Some(Arc::new(Shadow { range, sectors, of, generation, locks }));
        }
        shadow.clone()
    }

    /// Called by launches that do not track writes, after which tracking means nothing.
    pub(crate) fn stop_tracking(&self) {
        self.untracked.store(true, Ordering::Relaxed);
    }

    /// Whether reads of unwritten memory can be detected.
    pub(crate) fn tracking(&self) -> bool {
        !self.untracked.load(Ordering::Relaxed)
    }

    fn bitmap(&self, word: u64) -> &AtomicU64 {
        debug_assert!(word < self.written.bytes / 8, "word {word} of a bitmap of {} bytes", self.written.bytes);
        // SAFETY: a word index of an address in `range` is inside the bitmap, which has one bit per byte of `range`, is
        // page-aligned, and lives as long as self.
        unsafe { &*((self.written.base + word * 8) as *const AtomicU64) }
    }

    /// Whether all bytes have been written. The bytes must be inside the device's range, and at least one.
    #[inline]
    pub(crate) fn written(&self, at: u64, bytes: u64) -> bool {
        let first = at - self.range.base;
        let last = first + bytes - 1;
        let (first_word, last_word) = (first / 64, last / 64);
        let from = !0u64 << (first % 64);
        let upto = !0u64 >> (63 - last % 64);
        if first_word == last_word {
            let want = from & upto;
            return self.bitmap(first_word).load(Ordering::Relaxed) & want == want;
        }
        self.bitmap(first_word).load(Ordering::Relaxed) & from == from
            && (first_word + 1..last_word).all(|word| self.bitmap(word).load(Ordering::Relaxed) == !0)
            && self.bitmap(last_word).load(Ordering::Relaxed) & upto == upto
    }

    /// Marks bytes as written, or as unwritten. The bytes must be inside the device's range, and at least one.
    #[inline]
    pub(crate) fn mark(&self, at: u64, bytes: u64, written: bool) {
        let first = at - self.range.base;
        let last = first + bytes - 1;
        let (first_word, last_word) = (first / 64, last / 64);
        for word in first_word..=last_word {
            let mut bits = !0u64;
            if word == first_word {
                bits &= !0u64 << (first % 64);
            }
            if word == last_word {
                bits &= !0u64 >> (63 - last % 64);
            }
            let cell = self.bitmap(word);
            let old = cell.load(Ordering::Relaxed);
            if written && old & bits != bits {
                cell.fetch_or(bits, Ordering::Relaxed);
            } else if !written && old & bits != 0 {
                cell.fetch_and(!bits, Ordering::Relaxed);
            }
        }
    }

    /// Marks bytes as unwritten. Whole pages of the bitmap are returned to the operating system, which zeroes them.
    fn unmark(&self, at: u64, bytes: u64) {
        let bits = 8 * PAGE;
        let first = at - self.range.base;
        let (from, upto) = (first.next_multiple_of(bits), (first + bytes) / bits * bits);
        // Only on Linux are returned pages sure to read as zero.
        if from >= upto || cfg!(not(target_os = "linux")) {
            return self.mark(at, bytes, false);
        }
        if from > first {
            self.mark(at, from - first, false);
        }
        if first + bytes > upto {
            self.mark(self.range.base + upto, first + bytes - upto, false);
        }
        let page = (self.written.base + from / 8) as *mut libc::c_void;
        // SAFETY: whole pages inside the bitmap, a private anonymous mapping to which no reference is held.
        unsafe { libc::madvise(page, ((upto - from) / 8) as usize, libc::MADV_DONTNEED) };
    }

    /// Describes what lies nearest to an address, for messages.
    pub fn nearest(&self, address: u64) -> String {
        lock(&self.table).nearest(address)
    }
}

impl Table {
    /// Fails unless the range is inside one live allocation.
    fn require(&self, what: &str, at: u64, bytes: u64) -> Result<(), MemoryError> {
        let found = self.find(at).filter(|a| bytes <= a.bytes - (at - a.address));
        if found.is_none() && bytes > 0 {
            let message = format!("{what} {bytes} bytes at {at:#x} lie in no allocation: {}", self.nearest(at));
            return Err(MemoryError::new(message));
        }
        Ok(())
    }

    /// Returns a range to the free list, merged with its neighbours.
    fn release(&mut self, mut at: u64, mut bytes: u64) {
        if let Some((&before, &size)) = self.free.range(..at).next_back()
            && before + size == at
        {
            self.free.remove(&before);
            (at, bytes) = (before, bytes + size);
        }
        if let Some(size) = self.free.remove(&(at + bytes)) {
            bytes += size;
        }
        self.free.insert(at, bytes);
    }

    fn find(&self, address: u64) -> Option<Allocation> {
        let (_, allocation) = self.live.range(..=address).next_back()?;
        (address - allocation.address < allocation.bytes).then_some(*allocation)
    }

    fn nearest(&self, address: u64) -> String {
        if let Some((freed, _)) = self.resting.iter().rev().find(|(a, _)| address.wrapping_sub(a.address) < a.bytes) {
            return format!(
                "it is inside allocation {} of {} bytes at {:#x}, which has been freed",
                freed.serial, freed.bytes, freed.address
            );
        }
        let before = self.live.range(..=address).next_back().map(|(_, a)| a);
        let after = self.live.range(address..).next().map(|(_, a)| a);
        let distance_before = before.map(|a| address - a.address.saturating_add(a.bytes).min(address));
        let distance_after = after.map(|a| a.address - address);
        match (before, after) {
            (None, None) => "nothing is allocated".into(),
            (Some(a), _)
                if distance_after.is_none_or(|after| distance_before.is_some_and(|before| before <= after)) =>
            {
                let past = address as i128 - (a.address + a.bytes) as i128;
                let place = match past {
                    ..0 => "inside".to_string(),
                    0 => "right behind".to_string(),
                    _ => format!("{past} bytes behind"),
                };
                format!(
                    "the nearest allocation is number {} of {} bytes at {:#x}; the address is {place} it",
                    a.serial, a.bytes, a.address
                )
            }
            (_, Some(a)) => format!(
                "the nearest allocation is number {} of {} bytes at {:#x}; the address is {} bytes before it",
                a.serial,
                a.bytes,
                a.address,
                a.address - address
            ),
            (Some(_), None) => unreachable!("covered by the second arm: nothing after"),
        }
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    /// Resident set size of this process, in bytes.
    fn resident() -> u64 {
        let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
        let pages: u64 = pages.split(' ').nth(1).unwrap().parse().unwrap();
        // SAFETY: sysconf only returns a number.
        pages * unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as u64
    }

    fn bytes_at(at: u64, bytes: usize) -> Vec<u8> {
        // SAFETY: callers pass live allocations.
        unsafe { std::slice::from_raw_parts(at as *const u8, bytes) }.to_vec()
    }

    /// A large allocation that is hardly touched costs neither time nor memory, and is as fresh as any other: at both
    /// ends, at the seams of the mapped file, and when it is reused.
    #[test]
    #[cfg_attr(miri, ignore = "device memory is mapped at fixed addresses, by memfd_create")]
    fn large_allocations_cost_what_is_touched() {
        for zero in [false, true] {
            costs_what_is_touched(zero);
        }
    }

    fn costs_what_is_touched(zero: bool) {
        let memory = Memory::filled(4 << 30, zero);
        let fresh = if zero { 0 } else { POISON };
        let odd = memory.alloc(1000).unwrap();
        let before = resident();
        let bytes = (3 << 30) + 12_345;
        for round in 0..3 {
            let at = memory.alloc(bytes).unwrap();
            let places = [0, 100, PAGE, POISON_FILE, POISON_FILE + PAGE, 1 << 30, bytes - PAGE, bytes - 64];
            for place in places {
                assert_eq!(bytes_at(at + place, 64), [fresh; 64], "round {round}, {place}");
                assert!(!memory.written(at + place, 1), "round {round}, {place}");
                memory.copy_in(at + place, &[7; 64]).unwrap();
                assert!(memory.written(at + place, 64));
            }
            // Neighbours are left alone.
            assert_eq!(bytes_at(odd, 1000), if round == 0 { [fresh; 1000] } else { [5; 1000] });
            memory.copy_in(odd, &[5; 1000]).unwrap();
            memory.free(at).unwrap();
        }
        let grown = resident().saturating_sub(before);
        assert!(grown < 128 << 20, "{grown} bytes more in memory after allocating {bytes} three times");
    }
}
