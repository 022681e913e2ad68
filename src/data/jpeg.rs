//! Whether a JPEG file is whole: the decoder fills what is missing with grey and says nothing. So the compressed data
//! are walked through here, code by code without computing a pixel, and must hold every block that the header promises,
//! whatever markers stand where they end.
//!
//! After ITU-T T.81: annex F for sequential scans, annex G for progressive ones. What this does not know (arithmetic
//! coding, lossless and hierarchical files, tables that are only implied) is left to the decoder, which refuses it or
//! knows better.

/// What is wrong with a file, as the end of a sentence.
pub type Flaw = &'static str;

const CUT: Flaw = "it is cut short";
const EARLY: Flaw = "its compressed data end early";
const DAMAGED: Flaw = "its compressed data are damaged";

/// Refuses a file without its end marker, or with less data than its header promises. True if the image is whole, but
/// coarser than a finished one: a progressive file may end between two scans, which the standard allows.
pub fn check(bytes: &[u8]) -> Result<bool, Flaw> {
    let mut file = Walk::default();
    // Behind the start marker.
    let mut at = 2;
    loop {
        at = marker(bytes, at).ok_or(CUT)?;
        let kind = bytes[at + 1];
        at += 2;
        match kind {
            0xD9 => break,
            // Markers without a segment.
            0x01 | 0xD0..=0xD8 => continue,
            _ => {}
        }
        let length = bytes.get(at..at + 2).map(|b| usize::from(u16::from_be_bytes([b[0], b[1]]))).ok_or(CUT)?;
        let segment = bytes.get(at + 2..at + length.max(2)).ok_or(CUT)?;
        at += length.max(2);
        // What cannot be understood is left to the decoder, but for the end marker.
        let understood = match kind {
            0xC0..=0xC2 => file.frame(segment, kind == 0xC2),
            0xC4 => file.tables(segment),
            0xDD => file.restart_interval(segment),
            0xDA => match file.scan(segment) {
                None => None,
                Some(scan) => {
                    let early = |flaw| if has_end(bytes, at) { flaw } else { CUT };
                    at = file.walk(&scan, bytes, at).map_err(early)?;
                    Some(())
                }
            },
            0xC3 | 0xC5..=0xC7 | 0xC9..=0xCB | 0xCD..=0xCF => None,
            _ => Some(()),
        };
        if understood.is_none() {
            return if has_end(bytes, at) { Ok(false) } else { Err(CUT) };
        }
    }
    file.ended()
}

/// Place of the next marker at or after `at`, past compressed data and what else lies between segments.
fn marker(bytes: &[u8], mut at: usize) -> Option<usize> {
    loop {
        match (bytes.get(at)?, bytes.get(at + 1)?) {
            (0xFF, 0x00) => at += 2,
            (0xFF, 0xFF) => at += 1,
            (0xFF, _) => return Some(at),
            _ => at += 1,
        }
    }
}

/// True if an end marker follows, outside any segment: a thumbnail has one of its own.
fn has_end(bytes: &[u8], mut at: usize) -> bool {
    while let Some(found) = marker(bytes, at) {
        at = match bytes[found + 1] {
            0xD9 => return true,
            0x01 | 0xD0..=0xD8 => found + 2,
            _ => match bytes.get(found + 2..found + 4) {
                Some(length) => found + 2 + usize::from(u16::from_be_bytes([length[0], length[1]])),
                None => return false,
            },
        };
    }
    false
}

/// A component of the frame.
struct Component {
    id: u8,
    /// Blocks per MCU of an interleaved scan, across and down.
    sampling: (usize, usize),
    /// Blocks of a scan of its own, across and down.
    blocks: (usize, usize),
    /// Of each block, the coefficients that are not zero so far; needed by the refining scans of progressive files.
    nonzero: Vec<u64>,
    /// Of each coefficient, how many of its lower bits are still to come; `None` if nothing has come.
    missing: [Option<u8>; 64],
}

/// A scan as its header describes it.
struct Scan {
    /// Index of each component, with its tables for DC and AC.
    parts: Vec<(usize, usize, usize)>,
    /// First and last coefficient.
    band: (usize, usize),
    /// True for the first scan of these coefficients' upper bits, false for one that refines them by a bit.
    first: bool,
    /// How many lower bits are left to later scans.
    low: u8,
}

/// What is known so far of a file.
#[derive(Default)]
struct Walk {
    progressive: bool,
    /// MCUs of an interleaved scan.
    mcus: usize,
    components: Vec<Component>,
    dc: [Option<Table>; 4],
    ac: [Option<Table>; 4],
    /// MCUs between restart markers; 0: none.
    interval: usize,
}

impl Walk {
    fn frame(&mut self, segment: &[u8], progressive: bool) -> Option<()> {
        let [8, h0, h1, w0, w1, count, rest @ ..] = segment else { return None };
        let (h, w) = (usize::from(u16::from_be_bytes([*h0, *h1])), usize::from(u16::from_be_bytes([*w0, *w1])));
        let sampling: Vec<(u8, usize, usize)> =
            rest.chunks_exact(3).map(|c| (c[0], usize::from(c[1] >> 4), usize::from(c[1] & 15))).collect();
        let good = sampling.iter().all(|(_, x, y)| (1..=4).contains(x) && (1..=4).contains(y));
        if h == 0 || w == 0 || !good || sampling.len() != usize::from(*count) || !self.components.is_empty() {
            return None;
        }
        let x_most = sampling.iter().map(|s| s.1).max()?;
        let y_most = sampling.iter().map(|s| s.2).max()?;
        self.mcus = w.div_ceil(8 * x_most) * h.div_ceil(8 * y_most);
        self.progressive = progressive;
        let component = |&(id, x, y): &(u8, usize, usize)| {
            let blocks = ((w * x).div_ceil(x_most).div_ceil(8), (h * y).div_ceil(y_most).div_ceil(8));
            Component { id, sampling: (x, y), blocks, nonzero: Vec::new(), missing: [None; 64] }
        };
        self.components = sampling.iter().map(component).collect();
        Some(())
    }

    fn tables(&mut self, mut segment: &[u8]) -> Option<()> {
        while !segment.is_empty() {
            let (head, rest) = segment.split_at_checked(17)?;
            let count: usize = head[1..].iter().map(|&n| usize::from(n)).sum();
            let (values, rest) = rest.split_at_checked(count)?;
            let place = usize::from(head[0] & 15);
            let tables = if head[0] >> 4 == 0 { &mut self.dc } else { &mut self.ac };
            *tables.get_mut(place)? = Some(Table::new(&head[1..], values)?);
            segment = rest;
        }
        Some(())
    }

    fn restart_interval(&mut self, segment: &[u8]) -> Option<()> {
        self.interval = usize::from(u16::from_be_bytes([*segment.first()?, *segment.get(1)?]));
        Some(())
    }

    fn scan(&self, segment: &[u8]) -> Option<Scan> {
        let (&count, rest) = segment.split_first()?;
        let (parts, rest) = rest.split_at_checked(2 * usize::from(count))?;
        let [from, to, bits] = *rest.first_chunk::<3>()?;
        let part = |p: &[u8]| {
            let index = self.components.iter().position(|c| c.id == p[0])?;
            Some((index, usize::from(p[1] >> 4), usize::from(p[1] & 15)))
        };
        let parts: Vec<_> = parts.chunks_exact(2).map(part).collect::<Option<_>>()?;
        // The band of a sequential scan is whole whatever its header says, as decoders take it.
        let (band, high, low) = match self.progressive {
            true => ((usize::from(from), usize::from(to)), bits >> 4, bits & 15),
            false => ((0, 63), 0, 0),
        };
        let has = |tables: &[Option<Table>; 4], place: usize| tables.get(place).is_some_and(Option::is_some);
        let first = high == 0;
        let (needs_dc, needs_ac) = (band.0 == 0 && first, band.1 > 0);
        let known =
            parts.iter().all(|&(_, dc, ac)| (!needs_dc || has(&self.dc, dc)) && (!needs_ac || has(&self.ac, ac)));
        // In progressive files DC comes in scans of its own, AC in scans of one component.
        let allowed = !self.progressive || band == (0, 0) || (band.0 > 0 && parts.len() == 1);
        let good = !parts.is_empty() && band.0 <= band.1 && band.1 < 64 && known && allowed;
        good.then_some(Scan { parts, band, first, low })
    }

    /// Walks through the data of a scan, which begin at `at`; returns where they end.
    fn walk(&mut self, scan: &Scan, bytes: &[u8], at: usize) -> Result<usize, Flaw> {
        let mut bits = Bits { bytes, at, held: 0, count: 0 };
        let alone = scan.parts.len() == 1;
        let mcus = match (alone, &self.components[scan.parts[0].0]) {
            (true, component) => component.blocks.0 * component.blocks.1,
            (false, _) => self.mcus,
        };
        if self.progressive && scan.band.0 > 0 {
            let nonzero = &mut self.components[scan.parts[0].0].nonzero;
            nonzero.resize(mcus, 0);
        }
        // Blocks that the last code said to have no more coefficients.
        let mut run = 0;
        for mcu in 0..mcus {
            if self.interval > 0 && mcu > 0 && mcu.is_multiple_of(self.interval) {
                bits.restart()?;
                run = 0;
            }
            for &(index, dc, ac) in &scan.parts {
                let component = &mut self.components[index];
                let blocks = if alone { 1 } else { component.sampling.0 * component.sampling.1 };
                for _ in 0..blocks {
                    if !self.progressive {
                        bits.dc(&self.dc[dc])?;
                        bits.ac(&self.ac[ac], (1, 63), &mut 0, &mut 0)?;
                    } else if scan.band.0 == 0 {
                        if scan.first { bits.dc(&self.dc[dc])? } else { bits.skip(1)? }
                    } else if scan.first {
                        bits.ac(&self.ac[ac], scan.band, &mut run, &mut component.nonzero[mcu])?;
                    } else {
                        bits.refine(&self.ac[ac], scan.band, &mut run, &mut component.nonzero[mcu])?;
                    }
                }
            }
        }
        for &(index, ..) in &scan.parts {
            self.components[index].missing[scan.band.0..=scan.band.1].fill(Some(scan.low));
        }
        Ok(bits.at)
    }

    /// At the end marker.
    fn ended(&self) -> Result<bool, Flaw> {
        if self.components.iter().any(|component| component.missing[0].is_none()) {
            return Err(EARLY);
        }
        Ok(self.components.iter().flat_map(|component| &component.missing).any(|&missing| missing != Some(0)))
    }
}

/// A Huffman table.
struct Table {
    /// By the next 9 bits: length and value of a code that is no longer than that; length 0 for others.
    short: Vec<(u8, u8)>,
    /// By length: the first code that is too large for it, left-aligned in 16 bits, and what to add to a code, shifted
    /// down to its length, for the index of its value.
    long: [(u32, i32); 17],
    values: Vec<u8>,
}

const SHORT: u32 = 9;

impl Table {
    /// From the number of codes of each length and their values; `None` for more codes than there can be.
    fn new(counts: &[u8], values: &[u8]) -> Option<Table> {
        let mut table = Table { short: vec![(0, 0); 1 << SHORT], long: [(0, 0); 17], values: values.to_vec() };
        let (mut code, mut index) = (0u32, 0usize);
        for length in 1..=16u32 {
            let count = u32::from(counts[length as usize - 1]);
            if code + count > 1 << length {
                return None;
            }
            table.long[length as usize] = ((code + count) << (16 - length), index as i32 - code as i32);
            for k in 0..count {
                if length <= SHORT {
                    let first = ((code + k) << (SHORT - length)) as usize;
                    table.short[first..first + (1 << (SHORT - length))]
                        .fill((length as u8, values[index + k as usize]));
                }
            }
            index += count as usize;
            code = (code + count) << 1;
        }
        Some(table)
    }
}

/// The bits of a scan, up to the next marker.
struct Bits<'a> {
    bytes: &'a [u8],
    /// The next byte; never behind a marker.
    at: usize,
    /// Bits taken from the bytes, in the upper end.
    held: u64,
    count: u32,
}

impl Bits<'_> {
    fn fill(&mut self) {
        while self.count <= 56 {
            let byte = match (self.bytes.get(self.at), self.bytes.get(self.at + 1)) {
                (Some(0xFF), Some(0x00)) => {
                    self.at += 1;
                    0xFF
                }
                (Some(0xFF), _) | (None, _) => return,
                (Some(&byte), _) => byte,
            };
            self.at += 1;
            self.held |= u64::from(byte) << (56 - self.count);
            self.count += 8;
        }
    }

    fn skip(&mut self, count: u32) -> Result<(), Flaw> {
        self.take(count).map(|_| ())
    }

    /// The next bits, at most 16, as a number.
    fn take(&mut self, count: u32) -> Result<u32, Flaw> {
        if self.count < count {
            self.fill();
            if self.count < count {
                return Err(EARLY);
            }
        }
        // In two steps, since none of 64 bits can be shifted out by 64.
        let taken = (self.held >> 1) >> (63 - count);
        self.held <<= count;
        self.count -= count;
        Ok(taken as u32)
    }

    /// The value of the next code.
    fn code(&mut self, table: &Option<Table>) -> Result<u8, Flaw> {
        let Some(table) = table else { return Err(DAMAGED) };
        if self.count < 16 {
            self.fill();
        }
        let (length, value) = table.short[(self.held >> (64 - SHORT)) as usize];
        if length > 0 {
            return self.take(u32::from(length)).map(|_| value);
        }
        let next = (self.held >> 48) as u32;
        match (SHORT + 1..=16).find(|&length| next < table.long[length as usize].0) {
            Some(length) => {
                let code = self.take(length)?;
                let index = code as i32 + table.long[length as usize].1;
                table.values.get(index as usize).copied().ok_or(DAMAGED)
            }
            None if self.count < 16 => Err(EARLY),
            None => Err(DAMAGED),
        }
    }

    fn dc(&mut self, table: &Option<Table>) -> Result<(), Flaw> {
        let size = self.code(table)?;
        if size > 16 {
            return Err(DAMAGED);
        }
        self.skip(u32::from(size))
    }

    /// The coefficients `band` of a block, T.81 figures F.13 and G.3.
    fn ac(
        &mut self,
        table: &Option<Table>,
        band: (usize, usize),
        run: &mut u32,
        nonzero: &mut u64,
    ) -> Result<(), Flaw> {
        if *run > 0 {
            *run -= 1;
            return Ok(());
        }
        let mut k = band.0;
        while k <= band.1 {
            let code = self.code(table)?;
            let (zeros, size) = (usize::from(code >> 4), u32::from(code & 15));
            match (zeros, size) {
                (15, 0) => k += 16,
                (_, 0) => {
                    *run = (1 << zeros) - 1 + self.take(zeros as u32)?;
                    return Ok(());
                }
                _ => {
                    k += zeros;
                    self.skip(size)?;
                    // Decoders ignore a coefficient beyond the block.
                    *nonzero |= 1u64.checked_shl(k as u32).unwrap_or(0);
                    k += 1;
                }
            }
        }
        Ok(())
    }

    /// One more bit of the coefficients `band` of a block, T.81 figure G.7.
    fn refine(
        &mut self,
        table: &Option<Table>,
        band: (usize, usize),
        run: &mut u32,
        nonzero: &mut u64,
    ) -> Result<(), Flaw> {
        let mut k = band.0;
        while *run == 0 && k <= band.1 {
            let code = self.code(table)?;
            let (mut zeros, new) = (u32::from(code >> 4), code & 15 != 0);
            if new {
                self.skip(1)?;
            } else if zeros < 15 {
                *run = (1 << zeros) + self.take(zeros)?;
                break;
            }
            // Past the coefficients that are not zero, a bit each, and `zeros` that are and stay so.
            while k <= band.1 {
                if *nonzero >> k & 1 == 1 {
                    self.skip(1)?;
                } else if zeros == 0 {
                    break;
                } else {
                    zeros -= 1;
                }
                k += 1;
            }
            if new && k <= band.1 {
                *nonzero |= 1 << k;
            }
            k += 1;
        }
        if *run > 0 {
            let rest = (k..=band.1).filter(|k| *nonzero >> k & 1 == 1).count();
            for _ in 0..rest {
                self.skip(1)?;
            }
            *run -= 1;
        }
        Ok(())
    }

    /// Past the next restart marker.
    fn restart(&mut self) -> Result<(), Flaw> {
        let at = marker(self.bytes, self.at).ok_or(EARLY)?;
        if !matches!(self.bytes[at + 1], 0xD0..=0xD7) {
            return Err(EARLY);
        }
        (self.at, self.held, self.count) = (at + 2, 0, 0);
        Ok(())
    }
}
